"""Seconds and memory while the rows double, and what the fit says of 1.2 billion.

    python -m benchmarks.scaling [--rows 62500] [--minutes 30]

dedup is the self-join (64 neighbours above cosine 0.6), cluster five iterations of k-means with a
thousand clusters (their number is the recipe's, whatever the pool), retrieve the 4 nearest of a
query for every ten rows. The joins choose their own nprobe for recall .99. Medians of three runs,
each a process of its own, which makes its rows before the clock starts and touches the memory that
it will need: what a virtual machine touches for the first time takes a second a GB, which would be
counted for the largest size alone. The doubling ends when the next round would not fit in the time
or memory.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.measuring import child, forget_peak, machine, peak, say, table, target, timed
from benchmarks.vectors import COPIES, SEMANTIC, Floats, make
from curation.algorithms import kmeans, knn

DIM = 384
CLUSTERS = 1000
START = 62_500
POOL = 1_200_000_000
MOST_RATIO = 2.3
FITTED = 4  # the largest sizes, by which the power law is fitted
ROUND = 2.5  # how much longer the next round takes, at most
ROOM = 4 * DIM * 4  # bytes a row that a run may hold: rows, their copy by cells, and what it finds
TOUCHED = 2 * DIM * 4  # bytes a row, touched before the clock starts
RUNS = 3
SMALL = 3000  # rows of a run before the clock starts, so that all is loaded and compiled

RUN = """
import sys
from benchmarks.scaling import measure
print(*measure(sys.argv[1], int(sys.argv[2])))
"""


@dataclass(frozen=True)
class Run:
    rows: int
    seconds: float
    peak: float  # bytes
    held: float  # bytes above what was there with the rows made


def dedup(rows: Floats) -> None:
    knn.join(rows, rows, knn.Search(64, 0.6, itself=True))


def cluster(rows: Floats) -> None:
    kmeans.fit(rows, CLUSTERS, 5, np.random.default_rng(0))


def retrieve(rows: Floats) -> None:
    """The last eleventh of the rows asks the others."""
    base = len(rows) - len(rows) // 11
    knn.join(rows[base:], rows[:base], knn.Search(4))


TASKS: dict[str, Callable[[Floats], None]] = {
    "dedup": dedup,
    "cluster": cluster,
    "retrieve": retrieve,
}


def measure(task: str, count: int) -> tuple[float, int, int]:
    """Seconds, peak bytes, and bytes held before; of a process that does nothing else."""
    look = COPIES if task == "dedup" else SEMANTIC
    rows = make(count + count // 10 if task == "retrieve" else count, look, DIM)
    TASKS[task](rows[:SMALL])
    np.ones(count * TOUCHED, np.uint8)
    forget_peak()
    before = peak()
    seconds, _ = timed(TASKS[task], rows)
    return seconds, peak(), before


def double(start: int, seconds: float) -> dict[str, list[Run]]:
    """Runs of all tasks at rising sizes, for about so many seconds."""
    runs: dict[str, list[Run]] = {task: [] for task in TASKS}
    ends, rows, last = time.monotonic() + seconds, start, 0.0
    while time.monotonic() + ROUND * last < ends and rows * ROOM < free_bytes():
        began = time.monotonic()
        for task, done in runs.items():
            found = sorted(tuple(child(RUN, task, rows)) for _ in range(RUNS))
            taken, most, before = found[RUNS // 2]
            done.append(Run(rows, taken, most, most - before))
            all_seconds = ", ".join(f"{one[0]:.1f}" for one in found)
            say(f"{task}, {rows:,} rows: {all_seconds} s, {most / 2**30:.2f} GiB")
        last = time.monotonic() - began
        rows *= 2
    return runs


def free_bytes() -> int:
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    if not found:
        raise OSError("/proc/meminfo tells no MemAvailable")
    return int(found[1]) * 1024


def power_law(runs: list[Run]) -> tuple[float, float, float]:
    """(a, b, e): seconds = a rows^b by least squares of the logs, and its largest error (a share).

    Of the largest sizes only: fixed costs weigh on the smaller ones.
    """
    last = runs[-FITTED:]
    rows, seconds = np.log([run.rows for run in last]), np.log([run.seconds for run in last])
    power, start = np.polyfit(rows, seconds, 1)
    off = np.exp(np.abs(power * rows + start - seconds).max()) - 1
    return float(np.exp(start)), float(power), float(off)


def report(task: str, runs: list[Run]) -> None:
    """Prints one task's runs."""
    lines, before = [], None
    for run in runs:
        ratio = f"{run.seconds / before.seconds:.2f}" if before else ""
        rows_gib = run.rows * DIM * 4 / 2**30
        sizes = f"{rows_gib:.2f}", f"{run.peak / 2**30:.2f}", f"{run.held / run.rows:.0f}"
        lines.append([f"{run.rows:,}", f"{run.seconds:.1f}", ratio, *sizes])
        before = run
    print(f"{task}\n")
    head = ["rows", "s", "ratio", "rows, GiB", "peak, GiB", "bytes a row besides"]
    table(head, lines)


def extrapolate(runs: dict[str, list[Run]]) -> None:
    lines = []
    for task, done in runs.items():
        start, power, off = power_law(done)
        hours = start * POOL**power / 3600
        fit = f"{start:.3g} N^{power:.3f}"
        lines.append([task, fit, f"{off:.0%}", f"{hours:,.0f}"])
    print(f"Fit of the {FITTED} largest sizes, and what it says of {POOL:,} rows:\n")
    table(["", "seconds", "largest error of the fit", "hours of one such machine"], lines)
    print("Time only: rows that don't fit in memory go through `curate run`, which also reads and")
    print("writes them.\n")


def main(arguments: list[str] | None = None) -> int:
    """The number of targets missed."""
    parser = argparse.ArgumentParser(description="Time and memory while the rows double.")
    parser.add_argument("--rows", type=int, default=START, help="of the smallest size")
    parser.add_argument("--minutes", type=float, default=30.0, help="for all runs together")
    options = parser.parse_args(arguments)
    print(f"{machine()}\n", flush=True)
    runs = double(options.rows, 60 * options.minutes)
    missed = 0
    for task, done in runs.items():
        report(task, done)
        ratios = [after.seconds / before.seconds for before, after in pairwise(done)]
        if ratios:
            worst = max(ratios)
            what = f"{task}: at most {worst:.2f} times for twice the rows, of {MOST_RATIO}"
            missed += target(what, worst <= MOST_RATIO)
        else:
            missed += target(f"{task}: no doubling fitted in the time or memory", False)
        print()
    if all(len(done) > 1 for done in runs.values()):
        extrapolate(runs)
    return missed


if __name__ == "__main__":
    sys.exit(main())
