"""Connected components: time against scipy, and memory at 100 million nodes and in the dedup stage.

    python -m benchmarks.components [--nodes 1000000 10000000] [--runs 5]

As many random edges as nodes. Both sides run in turn in one process, ours compiled beforehand and
fed with blocks, as the stage does it. Memory is each child process's peak less what it starts with.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from curation.algorithms.components import Components

BLOCK = 1 << 20  # edges
LARGE = 100_000_000
POOL = 1_200_000_000
LEAST_RATIO = 5.0
MOST_GIB = 4.0
DEDUP_IMAGES = (2_000_000, 6_000_000)

Edges = NDArray[np.int64]

# Joins as many random edges as nodes, a block at a time; prints seconds and peak MiB above start.
LARGE_RUN = """
import resource, sys, time
import numpy as np
from curation.algorithms.components import Components

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

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
