"""Connected components: time against scipy, and memory at 100 million nodes.

    python -m benchmarks.components [--nodes 1000000 10000000] [--runs 5]

As many random edges as nodes. Both sides run in turn in one process, ours compiled beforehand and
fed with blocks, as the stage does it. Memory is each child process's peak less what it starts with.
"""

import argparse
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from benchmarks import dedup_memory
from benchmarks.measuring import child, timed
from curation.algorithms.components import Components

BLOCK = 1 << 20  # edges
LARGE = 100_000_000
POOL = 1_200_000_000
LEAST_RATIO = 5.0
MOST_GIB = 4.0

Edges = NDArray[np.int64]

# Joins as many random edges as nodes, a block at a time; prints seconds and the peaks in bytes
# before and after.
LARGE_RUN = """
import sys, time
import numpy as np
from benchmarks.measuring import peak
from curation.algorithms.components import Components

nodes, block = int(sys.argv[1]), int(sys.argv[2])
Components(9).add(np.arange(9), np.arange(9))
rng, start, joining = np.random.default_rng(0), peak(), 0.0
components = Components(nodes)
for at in range(0, nodes, block):
    left, right = rng.integers(0, nodes, (2, min(block, nodes - at)))
    began = time.perf_counter()
    components.add(left, right)
    joining += time.perf_counter() - began
began = time.perf_counter()
components.labels()
print(joining + time.perf_counter() - began, start, peak())
"""


def random_edges(nodes: int) -> tuple[Edges, Edges]:
    left, right = np.random.default_rng(nodes).integers(0, nodes, (2, nodes))
    return left, right


def ours(nodes: int, left: Edges, right: Edges) -> NDArray[Any]:
    components = Components(nodes)
    for start in range(0, len(left), BLOCK):
        components.add(left[start : start + BLOCK], right[start : start + BLOCK])
    return components.labels()


def matrix(nodes: int, left: Edges, right: Edges) -> csr_array:
    """In the types that `connected_components` works with, so that it converts nothing."""
    data = np.ones(len(left))
    return csr_array((data, (left.astype(np.int32), right.astype(np.int32))), (nodes, nodes))


def compare(nodes: int, runs: int) -> dict[str, float]:
    """Median seconds of both sides, in turn, on the same edges; their labels must agree."""
    left, right = random_edges(nodes)
    ours(9, left[:9] % 9, right[:9] % 9)  # compiled
    taken: dict[str, list[float]] = {"ours": [], "build": [], "scipy": []}

    def run(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        seconds, result = timed(work, *arguments)
        taken[name].append(seconds)
        return result

    for _ in range(runs):
        labels = run("ours", ours, nodes, left, right)
        graph = run("build", matrix, nodes, left, right)
        count, reference = run("scipy", connected_components, graph, False)
        del graph
        smallest = np.full(count, nodes)
        np.minimum.at(smallest, reference, np.arange(nodes))
        if (labels != smallest[reference]).any():
            raise AssertionError("not scipy's components")
    return {name: median(seconds) for name, seconds in taken.items()}


def speed_table(sizes: list[int], runs: int) -> int:
    """Prints the times; returns 1 if the ratio at the largest size misses its target."""
    print(f"connected components, as many random edges as nodes, medians of {runs} runs in turn\n")
    print("| nodes | here, s | scipy, s | ratio | scipy with its matrix, s | ratio |")
    print("|---|---|---|---|---|---|")
    ratio = 0.0
    for nodes in sizes:
        seconds = compare(nodes, runs)
        mine, alone = seconds["ours"], seconds["scipy"]
        whole, ratio = alone + seconds["build"], alone / mine
        cells = f"{mine:.3f} | {alone:.3f} | {ratio:.1f} | {whole:.3f} | {whole / mine:.1f}"
        print(f"| {nodes:,} | {cells} |")
    print(f"\nTarget: {LEAST_RATIO:.0f} at {sizes[-1]:,}, scipy's matrix not counted.\n")
    return int(ratio < LEAST_RATIO)


def memory_table(nodes: int) -> int:
    """Prints the peak of a large run in a process of its own; returns 1 above the target."""
    seconds, start, peak = child(LARGE_RUN, nodes, BLOCK)
    print("| nodes, random edges | join, s | process, GiB | of that NumPy and numba, GiB |")
    print("|---|---|---|---|")
    print(f"| {nodes:,} | {seconds:.1f} | {peak / 2**30:.2f} | {start / 2**30:.2f} |")
    each = (peak - start) / nodes
    print(f"\nTarget: {MOST_GIB:.0f} GiB. {each:.1f} bytes a node with the block in hand; at")
    print(f"{POOL:,} nodes {4 * POOL / 1e9:.1f} GB, {12 * POOL / 1e9:.1f} while giants are cut.\n")
    return int(peak / 2**30 >= MOST_GIB)


def main(arguments: list[str] | None = None) -> int:
    """The number of targets missed."""
    parser = argparse.ArgumentParser(description="Connected components: time and memory.")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--large", type=int, default=LARGE, help="nodes of the memory run")
    options = parser.parse_args(arguments)
    missed = speed_table(options.nodes, options.runs) + memory_table(options.large)
    dedup_memory.main([])
    return missed


if __name__ == "__main__":
    sys.exit(main())
