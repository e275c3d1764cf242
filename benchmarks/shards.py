"""Shards: images read by index beside webdataset's own reader, and shards written beside the disk.

    python -m benchmarks.shards --images ../shared/bench/pool [--copies 4]

Files are in the page cache. Medians of runs in turn, one thread; reading in processor time, so that
other work beside it counts little. webdataset reads tars from their beginning only: its shuffle
buffer stands where we read any image.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import webdataset
from xxhash import xxh3_64_intdigest

from benchmarks.measuring import machine, table, target
from curation.runtime.store import open_store, write_table
from curation.schema import PLAN, SHARDS_MANIFEST
from curation.stages.shard_plan import plan_path
from curation.stages.shards import ShardWorker, shards_manifest
from pretrain.shards import Shards, open_source

SHARD_IMAGES = 1000
RUNS = 5
LARGER = 10  # times, of the images of a second writing: 129 kB, as those of the web are
LEAST_TIMES, LEAST = 10.0, 0.8


def curate(folder: Path, images: list[bytes], shard_images: int) -> str:
    """A run whose shards hold these images, that lie in files of their own; returns its uri."""
    (folder / "files").mkdir(parents=True)
    rows = []
    for number, data in enumerate(images):
        name = f"{number:08d}.jpg"
        (folder / "files" / name).write_bytes(data)
        row = dict.fromkeys(PLAN.names)
        row |= {"image": number, "id": hashlib.sha256(data).digest(), "ext": "jpg", "role": "pool"}
        row["checksum"] = xxh3_64_intdigest(data)
        row |= {"key": name, "source": str(folder / "files"), "locator": name.encode()}
        row |= {"offset": -1, "size": len(data), "extras": [], "width": 1, "height": 1}
        rows.append(row | {"retrieved_by": []})
    uri = str(folder / "run")
    store, shards = open_store(uri), -(-len(images) // shard_images)
    write_table(store, plan_path(0), pa.Table.from_pylist(rows, schema=PLAN), shard_images)
    for shard in range(shards):
        write_shard(uri, shard)
    store.write(SHARDS_MANIFEST, json.dumps(shards_manifest("bench", shards, store)).encode())
    return uri


def write_shard(uri: str, shard: int) -> None:
    ShardWorker(uri, sys.maxsize, None)(shard)


held = b""


def hold(path: str) -> None:
    """Gives a process the bytes that it will write."""
    global held
    held = Path(path).read_bytes()


def write_held(uri: str, number: int) -> None:
    open_store(uri).write(f"block{number}", held)


def read_all(source: Shards, order: Any) -> int:
    return sum(len(source.read(int(number)).data) for number in order)


def stream(tars: list[str], buffer: int) -> int:
    """Only images, as we read them; the JSON beside each is skipped."""
    data = webdataset.WebDataset(
        tars, shardshuffle=False, select_files=lambda name: name.endswith(".jpg")
    )
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
    source = open_source(f"{curate(folder, images, SHARD_IMAGES)}/shards")
    assert isinstance(source, Shards)
    tars = sorted(str(path) for path in folder.glob("run/shards/*.tar"))
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


def writing(folder: Path, images: list[bytes]) -> int:
    """Prints MB/s of a shard's writer, of a plain write and of one with the hashes that a shard
    has, and of as many at once as there are cores; the targets missed. The plain ways hold all
    bytes in memory and read no file.
    """
    cores = os.cpu_count() or 1
    uri = curate(folder, images * cores, len(images))
    tar = folder / "run/shards/000000.tar"
    store, block = open_store(uri), tar.read_bytes()

    def hashing() -> None:
        for data in images:
            xxh3_64_intdigest(data)
        hashlib.sha256(block)

    def plain() -> None:
        hashing()
        store.write("block", block)

    with ProcessPoolExecutor(cores, get_context("spawn"), hold, (str(tar),)) as pool:
        ways: dict[str, Callable[[], object]] = {
            "write and sync": lambda: store.write("block", block),
            "xxh3 of the images, sha256 of the tar": hashing,
            "hash both, then write and sync": plain,
            "a shard": lambda: write_shard(uri, 0),
            f"{cores} plain writes at once": lambda: list(
                pool.map(write_held, [uri] * cores, range(cores))
            ),
            f"{cores} shards, a worker each": lambda: list(
                pool.map(write_shard, [uri] * cores, range(cores))
            ),
        }
        seconds = medians(ways, time.perf_counter)
    rates = {
        name: len(block) * (cores if name.startswith(f"{cores} ") else 1) / taken / 1e6
        for name, taken in seconds.items()
    }
    disk, _, plainly, one, disk_at_once, at_once = rates.values()
    images_kb = (
        f"{len(block) / 1e6:.0f} MB of images of {np.mean([*map(len, images)]) / 1e3:.0f} kB"
    )
    table([images_kb, "MB/s"], [[name, f"{rate:,.0f}"] for name, rate in rates.items()])
    missed = target(
        f"a shard: {one / plainly:.0%} of hashing, then writing, of 80 %", one >= LEAST * plainly
    )
    print(f"one worker: {one / disk:.0%} of a plain write")
    share = at_once / disk_at_once
    what = f"{cores} workers: {share:.0%} of the disk as {cores} plain writes find it, of 80 %"
    return missed + target(what, share >= LEAST)


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
        large = [data * LARGER for data in images[: len(files) // LARGER]]
        missed = reading(folder / "reading", images)
        missed += writing(folder / "writing", images[: len(files)])
        return missed + writing(folder / "large", large)


if __name__ == "__main__":
    sys.exit(main())
