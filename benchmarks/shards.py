"""Shards: images read by index beside webdataset's own reader, and shards written beside the disk.

    python -m benchmarks.shards --images ../shared/bench/pool [--copies 4]

Files are in the page cache. Medians of runs in turn, one thread; reading in processor time, so that
other work beside it counts little. webdataset reads tars from their beginning only: its shuffle
buffer stands where we read any image.
"""

import argparse
import hashlib
import io
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import webdataset

from benchmarks.measuring import machine, table, target
from curation.runtime.store import open_store, write_table
from curation.schema import PLAN
from curation.stages.shards import ShardWorker
from pretrain.shards import Shards, open_source

SHARD_IMAGES = 1000
RUNS = 5
LEAST_TIMES, LEAST_OF_DISK = 10.0, 0.8


def write_tars(images: list[bytes], folder: Path) -> None:
    """WebDataset tars with an image and a small JSON a sample, as `curate` writes them."""
    folder.mkdir()
    for start in range(0, len(images), SHARD_IMAGES):
        with tarfile.open(folder / f"{start:06d}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for number, data in enumerate(images[start : start + SHARD_IMAGES], start):
                for ext, content in (("jpg", data), ("json", b"{}")):
                    info = tarfile.TarInfo(f"{number:08d}.{ext}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def read_all(source: Shards, order: Any) -> int:
    return sum(len(source.read(int(number)).data) for number in order)


def stream(tars: list[str], buffer: int) -> int:
    data = webdataset.WebDataset(tars, shardshuffle=False)
    samples = data.shuffle(buffer) if buffer else data
    return sum(len(sample["jpg"]) for sample in samples)


def medians(ways: dict[str, Callable[[], Any]], clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of each, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(RUNS):
        for name, work in ways.items():
            began = clock()
            work()
            taken[name].append(clock() - began)
    return {name: float(np.median(seconds)) for name, seconds in taken.items()}


def reading(folder: Path, images: list[bytes]) -> int:
    """Prints samples a second of both readers; returns the targets missed."""
    source = open_source(str(folder), say=lambda _: None)
    assert isinstance(source, Shards)
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    count, whole = len(images), sum(map(len, images))
    shuffled = np.random.default_rng(0).permutation(count)
    ways: dict[str, Callable[[], int]] = {
        "by index, in order": lambda: read_all(source, range(count)),
        "webdataset, in order": lambda: stream(tars, 0),
        "by index, any order": lambda: read_all(source, shuffled),
        "webdataset, shuffle(1000)": lambda: stream(tars, 1000),
    }
    assert all(work() == whole for work in ways.values())
    taken = medians(ways, time.process_time)
    rates = {name: count / seconds for name, seconds in taken.items()}
    lines = [
        [name, f"{rate:,.0f}", f"{rate * whole / count / 1e6:,.0f}"] for name, rate in rates.items()
    ]
    table([f"{count:,} samples of {whole / count / 1e3:.1f} kB", "samples/s", "MB/s"], lines)
    in_order = rates["by index, in order"] / rates["webdataset, in order"]
    anyhow = rates["by index, any order"] / rates["webdataset, shuffle(1000)"]
    missed = target(f"in order {in_order:.1f} times webdataset, of 10", in_order >= LEAST_TIMES)
    return missed + target(f"in any order {anyhow:.1f} times, of 10", anyhow >= LEAST_TIMES)


def plan(folder: Path, images: list[bytes], store_uri: str) -> None:
    """The plan of one shard: its images lie in files of their own."""
    (folder / "files").mkdir()
    rows = []
    for number, data in enumerate(images):
        name = f"{number:08d}.jpg"
        (folder / "files" / name).write_bytes(data)
        row = dict.fromkeys(PLAN.names)
        row |= {"image": number, "id": hashlib.sha256(data).digest(), "ext": "jpg", "role": "pool"}
        row |= {"key": name, "source": str(folder / "files"), "locator": name.encode()}
        row |= {"offset": -1, "size": len(data), "extras": [], "width": 1, "height": 1}
        rows.append(row | {"retrieved_by": []})
    table_ = pa.Table.from_pylist(rows, schema=PLAN)
    write_table(open_store(store_uri), "shards/plan/000000.parquet", table_, len(rows))


def writing(folder: Path, images: list[bytes]) -> int:
    """Prints MB/s of a shard's writer and of the same bytes written at once; 1 if it is slower."""
    uri = str(folder / "run")
    plan(folder, images, uri)
    store, worker = open_store(uri), ShardWorker(uri, 1, None)
    worker(0)
    size = (folder / "run/shards/000000.tar").stat().st_size
    block = bytes(size)
    plainly = {"write and sync": lambda: store.write("block", block), "a shard": lambda: worker(0)}
    taken = medians(plainly, time.perf_counter)
    rates = {name: size / seconds / 1e6 for name, seconds in taken.items()}
    table([f"{size / 1e6:.0f} MB written", "MB/s"], [[n, f"{r:,.0f}"] for n, r in rates.items()])
    share = rates["a shard"] / rates["write and sync"]
    return target(f"shards at {share:.0%} of the disk, of 80 %", share >= LEAST_OF_DISK)


def main(arguments: list[str] | None = None) -> int:
    """The number of targets missed."""
    parser = argparse.ArgumentParser(description="Reading and writing shards.")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=2, help="of every image, to read for longer")
    options = parser.parse_args(arguments)
    print(f"{machine()}, webdataset {webdataset.__version__}\n", flush=True)
    files = sorted(path for path in options.images.iterdir() if path.suffix == ".jpg")
    images = [path.read_bytes() for path in files] * options.copies
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tars(images, folder / "tars")
        return reading(folder / "tars", images) + writing(folder, images[: len(files)])


if __name__ == "__main__":
    sys.exit(main())
