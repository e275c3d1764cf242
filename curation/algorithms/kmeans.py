"""Spherical k-means: Lloyd's iterations over an `assign` seam.

Rows are unit-norm fp32 (n, D); centroids are unit-norm too. The objective is the mean cosine of a
row to its centroid, which no iteration lowers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Assign = Callable[[Floats, Floats], tuple[Ints, Floats]]

BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Clustering:
    """Centroids (k, D) and the objective after each iteration."""

    centroids: Floats
    objective: tuple[float, ...]


def assign(rows: Floats, centroids: Floats) -> tuple[Ints, Floats]:
    """The nearest centroid of each row (n,) and its cosine (n,); ties go to the smaller number."""
    cluster = np.empty(len(rows), np.int64)
    cosine = np.empty(len(rows), np.float32)
    right = torch.from_numpy(centroids).T
    for start in range(0, len(rows), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        best = torch.max(torch.from_numpy(rows[block]) @ right, dim=1)
        cosine[block], cluster[block] = best.values.numpy(), best.indices.numpy()
    return cluster, cosine


def fit(
    rows: Floats, k: int, iterations: int, rng: np.random.Generator, assign_rows: Assign = assign
) -> Clustering:
    """k centroids of `rows`, started from distinct random rows; fewer rows than k give one each.

    Stops early when no row changes its cluster.
    """
    k = min(k, len(rows))
    centroids = rows[np.sort(rng.choice(len(rows), k, replace=False))].copy()
    objective: list[float] = []
    before: Ints | None = None
    for _ in range(iterations):
        cluster, cosine = assign_rows(rows, centroids)
        objective.append(float(cosine.mean(dtype=np.float64)))
        if before is not None and np.array_equal(cluster, before):
            break
        before = cluster
        centroids = _update(rows, cluster, cosine, k)
    return Clustering(centroids, tuple(objective))


def _update(rows: Floats, cluster: Ints, cosine: Floats, k: int) -> Floats:
    """Mean directions in fp64, summed in row order; an empty cluster takes a badly served row."""
    order = np.argsort(cluster, kind="stable")
    counts = np.bincount(cluster, minlength=k)
    filled = np.flatnonzero(counts)
    starts = np.concatenate([[0], np.cumsum(counts[filled])[:-1]])
    sums = np.zeros((k, rows.shape[1]))
    sums[filled] = np.add.reduceat(rows[order].astype(np.float64), starts, axis=0)
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        sums[empty] = rows[np.argsort(cosine, kind="stable")[: len(empty)]]
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    opposite = np.flatnonzero(norms[:, 0] < 1e-12)  # rows that cancel out have no mean direction
    if len(opposite):
        first = starts[np.searchsorted(filled, opposite)]
        sums[opposite] = rows[order[first]]
        norms[opposite] = 1.0
    directions: Floats = (sums / norms).astype(np.float32)
    return directions
