"""`make bench`: every table; `python -m benchmarks kmeans join`: some of them.

Learning, quality and copies need the images of LVD_SHARED or ../shared.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    components,
    copies,
    crops,
    embed,
    gpu_embed,
    gpu_pretrain,
    gpu_search,
    join,
    kmeans,
    learning,
    memory,
    plan,
    pretrain_step,
    quality,
    retrieval,
    scaling,
    service,
    shards,
    urls,
    vectors,
)

ENCODER = "encoder/deit_tiny_patch16_224_fp16.safetensors"
SHARED = Path(os.environ.get("LVD_SHARED", "../shared"))
LABELLED = SHARED / "bench"

# Each prints its tables and returns the number of targets missed.
TABLES: dict[str, Callable[[], int]] = {
    "vectors": lambda: vectors.main([]),
    "kmeans": lambda: kmeans.main([]),
    "join": lambda: join.main([]),
    "retrieval": lambda: retrieval.main([]),
    "scaling": lambda: scaling.main([]),
    "service": lambda: service.main([]),
    "gpu_search": lambda: gpu_search.main([]),
    "components": lambda: components.main([]),
    "memory": lambda: memory.main([]),
    "urls": lambda: urls.main([]),
    "crops": lambda: crops.main([]),
    "pretrain_step": lambda: pretrain_step.main([]),
    "gpu_pretrain": lambda: gpu_pretrain.main([]),
    "learning": lambda: learning.main(
        ["--bench", str(LABELLED), "--teacher", str(SHARED / ENCODER)]
    ),
    "quality": lambda: quality.main(["--bench", str(LABELLED), "--weights", str(SHARED / ENCODER)]),
    "copies": lambda: copies.main(["--images", str(LABELLED / "pool")]),
    "shards": lambda: shards.main(["--images", str(LABELLED / "pool")]),
    "plan": lambda: plan.main(["--images", str(LABELLED)]),
    "gpu_embed": lambda: gpu_embed.main(["--images", str(LABELLED / "pool")]),
    "embed": lambda: embed.main(
        ["--images", str(LABELLED / "pool"), "--weights", str(SHARED / ENCODER)]
    ),
}
NEED_IMAGES = {"learning", "quality", "copies", "shards", "plan", "embed", "gpu_embed"}


def main(arguments: list[str] | None = None) -> int:
    """The number of targets missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    chosen = parser.parse_args(arguments).tables or list(TABLES)
    unknown = [name for name in chosen if name not in TABLES]
    if unknown:
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    missed = 0
    for name in chosen:
        if name in NEED_IMAGES and not LABELLED.is_dir():
            print(f"no labelled images at {SHARED}: the table of {name} is left out")
            continue
        print(f"\n## {name}\n", flush=True)
        missed += TABLES[name]()
    return missed


if __name__ == "__main__":
    sys.exit(main())
