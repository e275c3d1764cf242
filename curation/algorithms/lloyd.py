"""Lloyd's iterations over a `sweep` seam: in memory, over blocks, or over many workers alike.

A sweep takes centroids and returns totals. Totals are whole numbers, so that they add up to the
same result in whatever order and grouping the rows were summed.
"""

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numba
import numpy as np

from curation.algorithms.products import NONE, Floats, Ints, as_rows, square_norms
from curation.algorithms.tiles import each

FIXED_BITS = 30  # of a component: 2**30 is 1; 8.6 billion unit rows fit an int64


@dataclass(frozen=True)
class Metric:
    """Spherical: unit rows, cosine, unit centroids. Plain: squared distance, means.

    `exponent`: rows are shorter than 2**exponent (0 for unit rows).
    """

    spherical: bool = True
    exponent: int = 0

    @classmethod
    def plain(cls, longest: float) -> "Metric":
        """For rows of at most this norm. Below 1e-27 the scale would leave fp32."""
        return cls(False, int(np.ceil(np.log2(max(longest, 1e-27)))))


@dataclass
class Totals:
    """Of some rows: their sums (k, D), counts (k,) and, if not spherical, the sum of their squares.

    Sums are in fixed point.
    """

    sums: Ints
    counts: Ints
    squares: int = 0

    @classmethod
    def empty(cls, k: int, dim: int) -> "Totals":
        return cls(np.zeros((k, dim), np.int64), np.zeros(k, np.int64))

    def add(self, rows: Floats, cluster: Ints, metric: Metric) -> None:
        """Counts rows (n, D) with their clusters (n,) in."""
        self.add_squares(rows, metric)
        self.move(rows, np.full(len(rows), NONE), cluster, metric)

    def add_squares(self, rows: Floats, metric: Metric) -> None:
        """Those of rows (n, D) that are new."""
        if not metric.spherical:
            fixed = np.rint(np.ldexp(square_norms(rows), FIXED_BITS - 2 * metric.exponent))
            self.squares += int(fixed.astype(np.int64).sum())

    def move(self, rows: Floats, before: Ints, after: Ints, metric: Metric) -> None:
        """Takes rows (n, D) out of clusters `before` (n,), NONE for none, and into `after` (n,)."""
        scale = np.float32(2.0 ** (FIXED_BITS - metric.exponent))
        columns = np.linspace(0, rows.shape[1], 9).astype(int)
        state = (rows, before, after, scale, self.sums)
        each(8, lambda i: _move(*state, columns[i], columns[i + 1]))
        size = len(self.counts)
        self.counts += np.bincount(after, minlength=size)
        self.counts -= np.bincount(before[before >= 0], minlength=size)

    def merge(self, other: "Totals") -> None:
        self.sums += other.sums
        self.counts += other.counts
        self.squares += other.squares


@runtime_checkable
class Summing(Protocol):
    """What assigns the same rows call after call, and adds up those that changed their cluster."""

    def totals(self, rows: Floats, centroids: Floats, metric: Metric) -> Totals:
        """How the totals of rows (n, D) differ from those of the last call."""


Sweep = Callable[[Floats], Totals]
Assign = Callable[[Floats, Floats], Ints]  # rows (n, D), centroids (k, D): nearest (n,)
Blocks = Callable[[], Iterable[Floats]]


class BlockSweep:
    """A sweep over blocks; only rows that change their cluster cost sums.

    `make_assigner(spherical)` makes what assigns one block, call after call.
    """

    def __init__(
        self, blocks: Blocks, metric: Metric, make_assigner: Callable[[bool], Assign]
    ) -> None:
        self._blocks, self._metric, self._make_assigner = blocks, metric, make_assigner
        self._assigners: list[Assign] = []
        self._clusters: list[Ints] = []
        self._totals: Totals | None = None

    def __call__(self, centroids: Floats) -> Totals:
        """The totals of all rows, valid until the next call."""
        totals = self._totals or Totals.empty(*centroids.shape)
        for number, block in enumerate(self._blocks()):
            rows = as_rows(block)
            if number == len(self._assigners):
                self._assigners.append(self._make_assigner(self._metric.spherical))
                self._clusters.append(np.full(len(rows), NONE))
                totals.add_squares(rows, self._metric)
            assigner = self._assigners[number]
            if isinstance(assigner, Summing):
                totals.merge(assigner.totals(rows, centroids, self._metric))
                continue
            cluster = assigner(rows, centroids)
            totals.move(rows, self._clusters[number], cluster, self._metric)
            self._clusters[number] = cluster
        self._totals = totals
        return totals


@dataclass(frozen=True)
class Clustering:
    """Centroids (k, D) and, before each of their moves, the objective.

    The objective is the mean cosine of a row to its centroid (rising), or for plain k-means the
    mean squared distance (falling). `rests`: the last move changed nothing.
    """

    centroids: Floats
    objective: tuple[float, ...]
    rests: bool = False


def lloyd(
    start: Clustering,
    sweep: Sweep,
    iterations: int,
    metric: Metric,
    note: Callable[[Clustering], None] = lambda _: None,
) -> Clustering:
    """Moves centroids (k, D) up to `iterations` times; stops when they rest.

    `start` may hold what earlier iterations have reached: those count. `note` is called after each.
    """
    now = start
    while len(now.objective) < iterations and not now.rests:
        totals = sweep(now.centroids)
        centroids = moved(now.centroids, totals, metric)
        rests = np.array_equal(centroids, now.centroids)
        now = Clustering(
            centroids, (*now.objective, objective(now.centroids, totals, metric)), rests
        )
        note(now)
    return now


def objective(centroids: Floats, totals: Totals, metric: Metric) -> float:
    """The mean over all rows that were assigned to these centroids: from their sums alone."""
    wide, count = centroids.astype(np.float64), max(1, int(totals.counts.sum()))
    sums = np.ldexp(totals.sums.astype(np.float64), metric.exponent - FIXED_BITS)
    cosines = float(np.einsum("kd,kd->", wide, sums))
    if metric.spherical:
        return cosines / count
    squares = float(np.ldexp(float(totals.squares), 2 * metric.exponent - FIXED_BITS))
    own = float(np.einsum("kd,kd,k->", wide, wide, totals.counts.astype(np.float64)))
    return (squares - 2 * cosines + own) / count


def moved(centroids: Floats, totals: Totals, metric: Metric) -> Floats:
    """The means (k, D) of the clusters; an empty one takes half of the largest that is left."""
    means = np.ldexp(totals.sums.astype(np.float64), metric.exponent - FIXED_BITS)
    means /= np.maximum(totals.counts, 1)[:, None]
    lost = totals.counts == 0
    if metric.spherical:
        norms = np.linalg.norm(means, axis=1, keepdims=True)
        lost |= norms[:, 0] < 1e-9  # rows that cancel out have no mean direction
        means /= np.maximum(norms, 1e-9)
    means[lost] = centroids[lost]
    _split(means, totals.counts, np.flatnonzero(totals.counts == 0))
    if metric.spherical:
        means /= np.linalg.norm(means, axis=1, keepdims=True)
    return means.astype(np.float32)


def _split(means: np.ndarray, counts: Ints, empty: Ints) -> None:
    """Puts each empty centroid beside the one with most rows, and moves both apart by 1/512."""
    side = np.where(np.arange(means.shape[1]) % 2, 1 / 1024, -1 / 1024)
    crowded = np.flatnonzero(counts > 1) if len(empty) else empty
    heap = [(-int(counts[one]), int(one)) for one in crowded]  # of equal ones the first
    heapq.heapify(heap)
    for one in empty.tolist():
        if not heap or heap[0][0] > -2:
            return
        rows, largest = -heap[0][0], heap[0][1]
        means[one] = means[largest] * (1 + side)
        means[largest] *= 1 - side
        heapq.heapreplace(heap, (rows // 2 - rows, largest))
        heapq.heappush(heap, (-(rows // 2), one))


@numba.njit(nogil=True, cache=True)
def _move(
    rows: Floats, before: Ints, after: Ints, scale: np.float32, sums: Ints, first: int, last: int
) -> None:
    for i in range(rows.shape[0]):
        if before[i] == after[i]:
            continue
        row, into = rows[i], sums[after[i]]
        for d in range(first, last):
            into[d] += np.int64(np.int32(np.rint(row[d] * scale)))
        if before[i] >= 0:
            out_of = sums[before[i]]
            for d in range(first, last):
                out_of[d] -= np.int64(np.int32(np.rint(row[d] * scale)))
