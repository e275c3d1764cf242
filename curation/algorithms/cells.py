"""Cells: coarse centroids that say where a row's neighbours lie.

The centroids come from flat k-means of a sample. Which cells are nearest to a row is the same
everywhere: they are ranked by whole numbers.
"""

from dataclasses import dataclass

import numpy as np

from curation.algorithms import gpu
from curation.algorithms.best import Neighbours
from curation.algorithms.lloyd import BlockSweep, Clustering, Metric, lloyd
from curation.algorithms.products import NONE, Doubles, Floats, Ids, Ints, square_norms
from curation.algorithms.ranking import Ranking
from curation.algorithms.scans import Within
from curation.algorithms.tiles import each_tile

ROUNDS = ((32, 3), (64, 1))  # rows a cell on which centroids are moved, and iterations
SAMPLE_PER_CELL = 64
LEAST = 2  # cells that any row asks in
NEAR_SHARE = 0.9  # of the score with its nearest cell: about what others score that a row asks in
RISE = 0.05  # of the score that a cell must have, by the log of how many are nearer
LEAF, POWER_STEPS = 8, 4  # of the bisection


@dataclass(frozen=True)
class Reach:
    """How far rows ask: in cells that score NEAR_SHARE of what their nearest one does, less
    `margin`, and RISE more by the log of their rank, in at least LEAST and at most `most`.

    A neighbour lies in a cell that scores less than the nearest one by a share, since neighbours
    are alike to a degree, and by chance besides. Rows far from all cells so ask in most of them;
    but the more are nearer, the less likely it is this one.
    """

    margin: float
    most: int

    @property
    def margins(self) -> Floats:
        """By rank (most,)."""
        return (self.margin - rises(np.arange(self.most))).astype(np.float32)


def rises(rank: Ints) -> Doubles:
    """How much more than the nearest cell's share those of some ranks (r,) must score: rounded, as
    logs differ in their last bits between machines."""
    return RISE * np.log1p(rank).round(4)


@dataclass(frozen=True)
class Cells:
    """Unit centroids (c, D)."""

    centroids: Floats

    @classmethod
    def fit(cls, sample: Floats, count: int, rng: np.random.Generator) -> "Cells":
        """min(count, n) cells of unit rows (n, D), near ones with near numbers."""
        told = np.flatnonzero(square_norms(sample))  # zeros have no say
        one = np.eye(1, sample.shape[1], dtype=np.float32)
        sample = sample[rng.permutation(told)] if len(told) else one
        count = max(1, min(count, len(sample)))
        centroids = _centroids(sample, count)
        return cls(centroids[_bisected(centroids)])

    def __len__(self) -> int:
        return len(self.centroids)

    def nearest(self, rows: Floats, count: int) -> Neighbours:
        """The `count` nearest cells of rows (n, D), nearest first, equal ones by number."""
        ranking, shape = self._ranking(), (len(rows), min(count, len(self)))
        found = Neighbours(np.empty(shape, np.float32), np.empty(shape, np.int64))

        def tile(start: int, stop: int) -> None:
            nearest = ranking.nearest(rows[start:stop], count)
            found.score[start:stop], found.number[start:stop] = nearest

        each_tile(len(rows), ranking.tile_rows, tile)
        return found

    def way(self, rows: Floats, reach: Reach) -> Ids:
        """The cells that rows (n, D) ask in, nearest first, then NONE: (n, reach.most)."""
        ranking, way = self._ranking(), np.full((len(rows), reach.most), NONE, np.int32)
        within = Within(NEAR_SHARE, reach.margins, LEAST)

        def tile(start: int, stop: int) -> None:
            near = ranking.near(rows[start:stop], within)
            way[start:stop, : near.shape[1]] = near

        each_tile(len(rows), ranking.tile_rows, tile)
        return way

    def _ranking(self) -> Ranking | gpu.Columns:
        return gpu.Columns(self.centroids) if gpu.device() else Ranking(self.centroids)

    def assign(self, rows: Floats) -> Ints:
        """The nearest cell of each row (n,)."""
        return self.nearest(rows, 1).number[:, 0]


def _centroids(sample: Floats, count: int) -> Floats:
    """k-means of unit rows (n, D) in random order, first on some of them.

    Cells that few iterations leave uneven are read more: most queries ask in large ones.
    """
    now = sample[:count]
    for per_cell, iterations in ROUNDS:
        rows = sample[: per_cell * count]
        now = _moved(rows, now, iterations)
    return now


def _moved(rows: Floats, start: Floats, iterations: int) -> Floats:
    sweep = BlockSweep(lambda: [rows], Metric(), lambda _: _nearest_of_moving)
    return lloyd(Clustering(start, ()), sweep, iterations, Metric()).centroids


def _nearest_of_moving(rows: Floats, centroids: Floats) -> Ints:
    return Cells(centroids).assign(rows)


def _bisected(points: Floats) -> Ints:
    """An order (n,) of points (n, D) in which near ones stand together: halves along the direction
    in which they differ most, and halves of these."""
    order, spans = np.arange(len(points)), [(0, len(points))]
    while spans:
        start, stop = spans.pop()
        if stop - start <= LEAF:
            continue
        mine = points[order[start:stop]]
        mine = mine - mine.mean(axis=0)
        axis = mine[np.argmax(np.einsum("nd,nd->n", mine, mine))]
        for _ in range(POWER_STEPS):
            axis = mine.T @ (mine @ axis)
            axis /= max(float(np.linalg.norm(axis)), 1e-12)
        order[start:stop] = order[start:stop][np.argsort(mine @ axis, kind="stable")]
        middle = (start + stop) // 2
        spans += [(start, middle), (middle, stop)]
    return order
