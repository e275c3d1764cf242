"""Cells: coarse centroids that say where a row's neighbours lie, found in fewer dimensions.

The centroids come from flat k-means of a sample. A row is compared with all of them in the leading
principal axes of the centroids, and with the best of those in all dimensions: centroids are means,
and their spread lies in few directions.
"""

from dataclasses import dataclass, replace

import numba
import numpy as np
import torch

from curation.algorithms.assign import Assigner
from curation.algorithms.best import NONE, Neighbours
from curation.algorithms.lloyd import BlockSweep, Clustering, Metric, lloyd
from curation.algorithms.products import (
    Floats,
    Ids,
    Ints,
    Products,
    each_tile,
    fast_dot,
    square_norms,
)

ROUNDS = ((32, 3), (64, 1))  # rows a cell on which centroids are moved, and iterations
SAMPLE_PER_CELL = 64
AXES = 192  # to begin with: fewer make hubs of cells that are near to all
MORE_AXES = 64  # at a time, while those don't do
FAR_ROWS = 0.15  # of all: those farthest from their nearest cell
FAR_CELLS = 4  # times as many are asked in by them
SPARE = 6  # cells compared in all dimensions, and a quarter of those asked for, beyond these
AGREEMENT = 0.99  # of rows whose nearest cell must be found
AGREEMENT_ROWS = 2048  # on which that is measured
TILE_ROWS = 1024
LEAF, POWER_STEPS = 8, 4  # of the bisection


@dataclass(frozen=True)
class Cells:
    """Unit centroids (c, D), and their principal axes (D, h), unit and orthogonal.

    With all axes the nearest cells are exact. Rows that score less than `far` with their nearest
    cell are noise to the centroids, as pictures after heavy edits are: their neighbours may be
    anywhere.
    """

    centroids: Floats
    axes: Floats
    far: float = -1.0

    @classmethod
    def fit(cls, sample: Floats, count: int, rng: np.random.Generator) -> "Cells":
        """min(count, n) cells of unit rows (n, D), near ones with near numbers."""
        told = np.flatnonzero(square_norms(sample))  # zeros have no say
        one = np.eye(1, sample.shape[1], dtype=np.float32)
        sample = sample[rng.permutation(told)] if len(told) else one
        count = max(1, min(count, len(sample)))
        centroids = _centroids(sample, count)
        cells = cls.along(centroids[_bisected(centroids)], AXES)
        few = sample[-AGREEMENT_ROWS:]  # the first ones were centroids
        truth = Assigner()(few, cells.centroids)
        while not cells.is_exact and (cells.assign(few) == truth).mean() < AGREEMENT:
            cells = cells.wider()
        return replace(cells, far=float(np.quantile(cells.nearest(few, 1).score, FAR_ROWS)))

    @classmethod
    def along(cls, centroids: Floats, axes: int) -> "Cells":
        """Centroids (c, D) that are told apart along so many axes."""
        _, vectors = np.linalg.eigh(centroids.T.astype(np.float64) @ centroids)
        leading = vectors[:, ::-1][:, :axes]
        return cls(centroids, np.ascontiguousarray(leading, dtype=np.float32))

    def __len__(self) -> int:
        return len(self.centroids)

    @property
    def is_exact(self) -> bool:
        return bool(self.axes.shape[1] == self.centroids.shape[1])

    def wider(self) -> "Cells":
        """Looks along a few axes more."""
        axes = self.axes.shape[1] + MORE_AXES
        return replace(self.along(self.centroids, axes), far=self.far)

    def exact(self) -> "Cells":
        """Looks along all axes."""
        return replace(self.along(self.centroids, self.centroids.shape[1]), far=self.far)

    def nearest(self, rows: Floats, count: int) -> Neighbours:
        """The `count` nearest cells of rows (n, D), nearest first."""
        count = min(count, len(self))
        shape = (len(rows), min(count + count // 4 + SPARE, len(self)))
        found = Neighbours(np.empty(shape, np.float32), np.empty(shape, np.int64))
        # fp32 whatever is faster: who is compared in all dimensions decides what a search finds.
        turn = Products(self.axes.T.copy(), dtype=torch.float32)
        heads = Products(self.centroids @ self.axes, dtype=torch.float32)

        def tile(start: int, stop: int) -> None:
            head = turn.scores(rows[start:stop]).copy()
            best = heads.top(head, shape[1])[1]
            ranked = found.score[start:stop], found.number[start:stop]
            _rank(rows[start:stop], self.centroids, best, *ranked)

        each_tile(len(rows), TILE_ROWS, tile)
        return Neighbours(found.score[:, :count], found.number[:, :count])

    def way(self, rows: Floats, nprobe: int) -> Ids:
        """The cells that rows (n, D) ask in, nearest first: `nprobe`, and FAR_CELLS times as many
        for those that lie far from all; then NONE."""
        near = self.nearest(rows, nprobe)
        width = min(FAR_CELLS * nprobe, len(self))
        way = np.full((len(rows), width), NONE, np.int32)
        way[:, : near.number.shape[1]] = near.number
        far = np.flatnonzero(near.score[:, 0] < self.far)
        way[far] = self.nearest(rows[far], width).number
        return way

    def assign(self, rows: Floats) -> Ints:
        """The nearest cell of each row (n,)."""
        return self.nearest(rows, 1).number[:, 0].copy()


@numba.njit(nogil=True, cache=True)
def _rank(rows: Floats, centroids: Floats, chosen: Ids, score: Floats, number: Ints) -> None:
    """Orders the chosen cells (n, m) of each row by their true scores, equal ones by number."""
    for i in range(rows.shape[0]):
        for slot in range(chosen.shape[1]):
            cell = chosen[i, slot]
            true, place = fast_dot(rows[i], centroids[cell]), slot
            while place > 0 and (
                score[i, place - 1] < true
                or (score[i, place - 1] == true and number[i, place - 1] > cell)
            ):
                score[i, place], number[i, place] = score[i, place - 1], number[i, place - 1]
                place -= 1
            score[i, place], number[i, place] = true, cell


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
    return Cells.along(centroids, AXES).assign(rows)


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
