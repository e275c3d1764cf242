"""Bytes an image that the driver of the dedup stage holds, from its peak at two sizes of a pool.

    python -m benchmarks.dedup_memory [--images 4000000 12000000]

The tables of the earlier stages and the answers of the search are made up: three images in ten have
copies, in groups of three; one image in a hundred hangs in a chained giant; one part is holdout.
"""

import argparse
import sys
import tempfile
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.measuring import child
from curation.runtime.store import FileStore, write_table
from curation.schema import EXACT, IMAGES, NEIGHBOURS, PARTS, PARTS_TABLE
from curation.stages.tables import EXACT_TABLE, Embedded, Part

PART_IMAGES = 10_000
POOL = 1_200_000_000

# Runs the stage after its search, once on few images to have all code loaded and compiled, then
# on all; prints this process's peak before and after in bytes.
RUN = """
import sys
from benchmarks.measuring import peak
from curation.runtime.store import FileStore
from curation.stages import dedup
from curation.stages.neighbour_plan import SearchConfig

how = SearchConfig("cells", 0, 0.9, 10**9)
cfg = dedup.DedupConfig("made-up", 64, 0.6, 0.45, 200, how, 0)
for folder in sys.argv[1:]:
    before = peak()
    report = dedup.run(cfg, "made-up", FileStore(folder), None, None)
    assert len(report.counts["giants"]) == 1, report.counts
print(before, peak())
"""


def make(folder: Path, images: int) -> None:
    """A run that stands after the searches of dedup. The last part is holdout."""
    store, embedded = FileStore(str(folder)), Embedded("made-up")
    rng = np.random.default_rng(0)
    parts = []
    for number, base in enumerate(range(0, images, PART_IMAGES)):
        role = "pool" if base + PART_IMAGES < images else "holdout"
        part = Part(number, role, "", "", "", "", 0, PART_IMAGES, base, str(number))
        ids = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(32), PART_IMAGES, [None, pa.py_buffer(rng.bytes(32 * PART_IMAGES))]
        )
        side = pa.array(rng.integers(64, 2000, PART_IMAGES), pa.int32())
        empty = pa.nulls(PART_IMAGES, pa.string())
        size = pa.nulls(PART_IMAGES, pa.int64())
        columns = [ids, empty, empty, empty, size, side, side, empty]
        write_table(store, embedded.images_path(part), pa.Table.from_arrays(columns, schema=IMAGES))
        write_table(store, f"dedup/self/answers/{number:06d}.parquet", links(base, images))
        parts.append(part)
    rows = zip(*(astuple(part) for part in parts), strict=True)
    table = [pa.array(row, field.type) for row, field in zip(rows, PARTS, strict=True)]
    write_table(store, PARTS_TABLE, pa.Table.from_arrays(table, schema=PARTS))
    copies = np.arange(5, images // 2, 100)
    write_table(store, EXACT_TABLE, pa.table([copies, copies - 5], schema=EXACT))
    near = pa.table(
        [np.arange(1000), images - 1 - np.arange(1000), np.full(1000, 0.7, np.float32)],
        schema=NEIGHBOURS,
    )
    write_table(store, "dedup/holdout/answers/000000.parquet", near)
    for name in ("self", "holdout"):
        store.write(f"dedup/{name}/search.json", b"{}")
    store.write("dedup/started.json", b'{"fingerprint": "made-up"}')


def links(base: int, images: int) -> pa.Table:
    """Groups i, i + 1, i + 2 for every tenth i, and a chain i, i + 10, ... with weak links."""
    first = np.arange(base, base + PART_IMAGES, 10)
    chain = first[first < images // 10] + 4
    left = np.concatenate([first, first + 1, chain])
    right = np.concatenate([first + 1, first + 2, chain + 10])
    cosine = np.concatenate([np.full(2 * len(first), 0.9), np.where(chain % 500 == 4, 0.65, 0.97)])
    return pa.table([left, right, cosine.astype(np.float32)], schema=NEIGHBOURS)


def held(images: int) -> int:
    """Bytes that the stage's peak is above the peak of a small run in the same process."""
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as large:
        make(Path(small), 5 * PART_IMAGES)
        make(Path(large), images)
        before, after = child(RUN, small, large)
    return int(after - before)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Memory of the dedup stage's driver.")
    parser.add_argument("--images", type=int, nargs=2, default=(4_000_000, 12_000_000))
    small, large = parser.parse_args(arguments).images
    peaks = [held(small), held(large)]
    each = (peaks[1] - peaks[0]) / (large - small)
    print("dedup's driver, 30 % of the images in groups of three\n")
    print(f"| | {small:,} images | {large:,} images | bytes an image | at 1.2 billion |")
    print("|---|---|---|---|---|")
    cells = f"{peaks[0] / 2**20:.0f} | {peaks[1] / 2**20:.0f} | {each:.1f}"
    print(f"| peak, MiB | {cells} | {each * POOL / 1e9:.0f} GB |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
