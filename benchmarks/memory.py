"""Peak memory of a worker at two pool sizes: it must not grow with the number of images.

    python -m benchmarks.memory [--sizes 1000 8000]

Every stage runs in a process of its own (`--ray off`: driver and worker together) on generated
pictures; its peak resident memory is read from the kernel.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from benchmarks.measuring import child

PART_IMAGES = 256
STAGES = ("ingest", "embed", "dedup", "cluster", "retrieve", "shards", "lineage", "report")

# Runs one stage more than is done, then prints this process's peak in bytes.
RUN = """
import sys
from benchmarks.measuring import peak
from curation.cli import main
status = main(["run", sys.argv[1], "--ray", "off", "--until", sys.argv[2]])
print(peak())
sys.exit(status)
"""


def picture(seed: int) -> Image.Image:
    """A colour pattern that no other seed resembles."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC)


def peaks(size: int, folder: Path) -> dict[str, float]:
    """Peak MiB of each stage, each in a process of its own, for a pool of `size` pictures."""
    for name, seeds in (("pool", range(size)), ("curated", range(10**6, 10**6 + 64))):
        (folder / name).mkdir()
        for seed in seeds:
            picture(seed).save(folder / name / f"{seed:07d}.jpg")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "name": "memory",
                "output": str(folder / "run"),
                "sources": {
                    "pool": [{"uri": str(folder / "pool")}],
                    "curated": {"wanted": {"uri": str(folder / "curated")}},
                },
                "encoder": {"model": "lvd_demo"},
                "cluster": {"k": 20},
                "shards": {"images_per_shard": 500},
                "resources": {"part_images": PART_IMAGES},
            }
        )
    )
    found = {}
    for stage in STAGES:
        (bytes_,) = child(RUN, recipe, stage)
        found[stage] = bytes_ / 2**20
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Peak memory at two pool sizes.")
    parser.add_argument("--sizes", type=int, nargs=2, default=(500, 2000))
    small, large = parser.parse_args(arguments).sizes
    results = {}
    for size in (small, large):
        with tempfile.TemporaryDirectory() as folder:
            results[size] = peaks(size, Path(folder))
    print(f"peak memory, MiB, parts of {PART_IMAGES} images")
    print(f"{'stage':<10}{small:>10,}{large:>10,}{'ratio':>8}")
    for stage in STAGES:
        before, after = results[small][stage], results[large][stage]
        print(f"{stage:<10}{before:>10.0f}{after:>10.0f}{after / before:>8.2f}")
    print(json.dumps({str(size): peak for size, peak in results.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
