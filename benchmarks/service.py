"""The service over a run of LVD-142M's size, and what fifty readers cost a run that goes on.

python -m benchmarks.service [--images 142000000] [--shards 120000] [--only large|readers]
"""

import argparse
import asyncio
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import numpy as np
import yaml
from PIL import Image

from benchmarks.measuring import machine, say, table, target, timed
from benchmarks.service_store import Size, build
from curation.service.client import Client

QUESTIONS = 400
PAGES = 400
READERS = 50
EVERY_S = 2.0  # as the page asks
POOL = 400
MAX_MS = 100.0  # p95 of what a person waits for
MAX_MIB = 500.0
MAX_SLOWER = 1.25


class Service:
    """`curate serve` in a process of its own."""

    def __init__(self, runs: Path) -> None:
        command = [sys.executable, "-m", "curation", "serve", str(runs), "--port", "0"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.start_s, line = timed(self._process.stdout.readline)
        self.url = line.split()[-1]

    def memory_mib(self, peak: bool = False) -> float:
        """Resident, or the most that was."""
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+)", text)
        assert found is not None
        return int(found[1]) / 1024

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


@contextlib.contextmanager
def serving(runs: Path) -> Iterator[Service]:
    service = Service(runs)
    try:
        yield service
    finally:
        service.close()


def main(arguments: Sequence[str]) -> int:
    """The number of targets missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=__doc__)
    parser.add_argument("--images", type=int, default=142_000_000)
    parser.add_argument("--shards", type=int, default=120_000)
    parser.add_argument("--only", choices=["large", "readers"])
    given = parser.parse_args(arguments)
    print(machine(), "\n")
    missed = 0
    if given.only != "readers":
        with tempfile.TemporaryDirectory() as folder:
            missed += large(Path(folder), Size(given.images, given.shards))
    if given.only != "large":
        with tempfile.TemporaryDirectory() as folder:
            missed += readers(Path(folder))
    return missed


def large(folder: Path, size: Size) -> int:
    """One finished run of the given size: its first and later answers, and memory."""
    seconds, ids = timed(build, folder / "runs" / "large", size)
    say(f"built in {seconds:.0f} s")
    rng = np.random.default_rng(1)
    with serving(folder / "runs") as service, Client(service.url) as client:
        started = service.memory_mib()
        queries = [ids[n] for n in rng.integers(0, 2_000, QUESTIONS)]
        others = [ids[n] for n in rng.integers(2_000, len(ids), QUESTIONS)]
        offsets = rng.integers(0, size.shards - 100, PAGES).tolist()
        sample = client.samples("large", "000003.tar", limit=1000).samples
        rows = [
            _asked("GET /api/runs", lambda _: client.runs(), range(PAGES)),
            _asked("GET /api/runs/{run}", lambda _: client.run("large"), range(PAGES)),
            _asked(
                "a page of 100 shards, anywhere",
                lambda at: client.shard_page("large", at),
                offsets,
            ),
            _asked(
                "a page of 60 images of a shard",
                lambda at: client.samples("large", f"{at % 12:06d}.tar", at % 1000, 60),
                range(PAGES),
            ),
            _asked(
                "a thumbnail, made now",
                lambda one: client.image("large", "000003.tar", one.key, 176),
                sample[:PAGES],
            ),
            _asked("lineage of an image, by id", lambda id: client.story("large", id), others),
            _asked("lineage of a query, by id", lambda id: client.story("large", id), queries),
        ]
        listed = timed(lambda: sum(1 for _ in client.shards("large")))
        peak = service.memory_mib(peak=True)
    print(f"{size.images:,} images, {size.shards:,} shards, {size.parts:,} parts\n")
    table(["ms", "first", "p50", "p95"], [[n, *(f"{x:.1f}" for x in xs)] for n, *xs in rows])
    print(f"All {listed[1]:,} shards listed in {listed[0]:.1f} s.")
    print(f"It starts in {service.start_s:.1f} s.")
    print(f"Memory: {started:.0f} MiB before the first request, at most {peak:.0f} MiB.\n")
    missed = target(f"at most {MAX_MIB:.0f} MiB above the start", peak - started <= MAX_MIB)
    slowest = max(row[3] for row in rows)
    return missed + target(f"p95 of every answer below {MAX_MS:.0f} ms", slowest < MAX_MS)


def _asked(
    name: str, ask: Callable[..., object], about: Sequence[object] | range
) -> tuple[str, float, float, float]:
    """Milliseconds: the first, the median and the 95th percentile of the rest."""
    took = [1000 * timed(ask, one)[0] for one in about]
    p50, p95 = np.percentile(took[1:], [50, 95])
    return name, took[0], float(p50), float(p95)


def readers(folder: Path) -> int:
    """The same run three times with nobody watching and three times with READERS pages open."""
    recipe = _project(folder)
    alone, watched, answers, cpu = [], [], list[float](), list[float]()
    for number in range(3):
        with serving(folder / "runs") as service:
            alone.append(_run(recipe, folder / "runs" / f"alone-{number}"))
            before, began = service.cpu_s(), time.monotonic()
            seconds, took = asyncio.run(
                _watched(service.url, recipe, folder / "runs" / f"watched-{number}")
            )
            cpu.append((service.cpu_s() - before) / (time.monotonic() - began))
            watched.append(seconds)
            answers += took
    p50, p95 = np.percentile(1000 * np.array(answers), [50, 95])
    slower = float(np.median(watched) / np.median(alone))
    print(f"{READERS} readers, each with a run's page and its shards every {EVERY_S:g} s,")
    print(f"while `curate run` goes through {POOL} images in one process\n")
    table(
        ["run alone, s", "watched, s", "ratio", "requests", "p50, ms", "p95, ms", "service, cores"],
        [
            [
                f"{np.median(alone):.1f}",
                f"{np.median(watched):.1f}",
                f"{slower:.2f}",
                len(answers),
                f"{p50:.1f}",
                f"{p95:.1f}",
                f"{np.median(cpu):.2f}",
            ]
        ],
    )
    missed = target(f"p95 below {MAX_MS:.0f} ms", p95 < MAX_MS)
    return missed + target(f"the run at most {MAX_SLOWER} times as long", slower <= MAX_SLOWER)


def _project(folder: Path) -> Path:
    """Pictures and a recipe for the built-in models."""
    rng = np.random.default_rng(0)
    for name, count in (("pool", POOL), ("curated", 20)):
        (folder / name).mkdir()
        for number in range(count):
            coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
            image = Image.fromarray(coarse).resize((224, 224), Image.Resampling.BICUBIC)
            image.save(folder / name / f"{number:05d}.jpg")
    (folder / "runs").mkdir()
    recipe = {
        "name": "watched",
        "output": "set by --set",
        "sources": {
            "pool": [{"uri": str(folder / "pool")}],
            "curated": {"a": {"uri": str(folder / "curated"), "retrieve": ["as_is"]}},
        },
        "encoder": {"model": "lvd_demo"},
        "cluster": {"k": 10},
        "resources": {"part_images": 32},
        "shards": {"images_per_shard": 10},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def _command(recipe: Path, output: Path) -> list[str]:
    command = [sys.executable, "-m", "curation", "run", str(recipe), "--ray", "off"]
    return [*command, "--set", f"output={output}"]


def _run(recipe: Path, output: Path) -> float:
    quiet = subprocess.DEVNULL
    command = _command(recipe, output)
    return timed(lambda: subprocess.run(command, check=True, stdout=quiet, stderr=quiet))[0]


async def _watched(url: str, recipe: Path, output: Path) -> tuple[float, list[float]]:
    """Seconds of the run, and of every answer that readers got meanwhile."""
    took: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        watching = [
            asyncio.create_task(_read(client, output.name, number, took))
            for number in range(READERS)
        ]
        began = time.monotonic()
        quiet = asyncio.subprocess.DEVNULL
        command = _command(recipe, output)
        process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
        await process.wait()
        seconds = time.monotonic() - began
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
    assert process.returncode == 0
    return seconds, took


async def _read(client: httpx.AsyncClient, run: str, number: int, took: list[float]) -> None:
    """What an open page asks: the moving part of the run's page, and the list of shards."""
    await asyncio.sleep(EVERY_S * number / READERS)
    while True:
        for path in (f"/runs/{run}", f"/runs/{run}/shards"):
            began = time.monotonic()
            answer = await client.get(path, headers={"HX-Request": "true"})
            if answer.status_code == 200:  # until the run has begun there is none
                took.append(time.monotonic() - began)
        await asyncio.sleep(EVERY_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
