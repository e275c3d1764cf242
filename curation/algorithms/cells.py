"""Cells: coarse centroids that say where a row's neighbours lie, found in fewer dimensions.

The centroids come from a k-means tree of a sample. A row is compared with all of them in the
leading principal axes of the centroids, and with the best of those in all dimensions: centroids are
means, and their spread lies in few directions.
"""

from dataclasses import dataclass, replace

import numba
import numpy as np

from curation.algorithms.assign import Assigner
from curation.algorithms.best import Neighbours
from curation.algorithms.lloyd import BlockSweep, Clustering, Metric, lloyd
from curation.algorithms.products import (
    Floats,
    Ints,
    Products,
    each,
    each_tile,
    fast_dot,
)

SPLITS = 2
FLAT = 256  # up to so many cells k-means has one level
ITERATIONS = 6
SAMPLE_PER_CELL = 32
AXES = 32  # to begin with
SPARE = 16  # cells compared in all dimensions beyond those asked for
AGREEMENT = 0.995  # of rows whose nearest cell must be found
TILE_ROWS = 1024


@dataclass(frozen=True)
class Cells:
    """Unit centroids (c, D), and their principal axes (D, h), unit and orthogonal.

    With all axes the nearest cells are exact.
    """

    centroids: Floats
    axes: Floats

    @classmethod
    def fit(cls, sample: Floats, count: int, rng: np.random.Generator) -> "Cells":
        """About `count` cells of unit rows (n, D), at most n; zeros have no say."""
        told = sample[sample.any(axis=1)]
        sample = told if len(told) else np.eye(1, sample.shape[1], dtype=np.float32)
        count = max(1, min(count, len(sample)))
        cells = cls(_tree(sample, count, rng), np.empty((sample.shape[1], 0), np.float32))
        few = sample[rng.choice(len(sample), min(2048, len(sample)), replace=False)]
        truth = Assigner()(few, cells.centroids)
        while (cells := cells.wider()).axes.shape[1] < sample.shape[1]:
            if (cells.assign(few) == truth).mean() >= AGREEMENT:
                break
        return cells

    def __len__(self) -> int:
        return len(self.centroids)

    @property
    def is_exact(self) -> bool:
        return bool(self.axes.shape[1] == self.centroids.shape[1])

    def wider(self) -> "Cells":
        """Looks along twice as many axes."""
        return self._along(max(AXES, 2 * self.axes.shape[1]))

    def exact(self) -> "Cells":
        """Looks along all axes."""
        return self._along(self.centroids.shape[1])

    def _along(self, axes: int) -> "Cells":
        _, vectors = np.linalg.eigh(self.centroids.T.astype(np.float64) @ self.centroids)
        leading = vectors[:, ::-1][:, :axes]
        return replace(self, axes=np.ascontiguousarray(leading, dtype=np.float32))

    def nearest(self, rows: Floats, count: int) -> Neighbours:
        """The `count` nearest cells of rows (n, D), nearest first."""
        count = min(count, len(self))
        shape = (len(rows), min(count + count // 2 + SPARE, len(self)))
        found = Neighbours(np.empty(shape, np.float32), np.empty(shape, np.int64))
        turn, heads = Products(self.axes.T.copy()), Products(self.centroids @ self.axes)

        def tile(start: int, stop: int) -> None:
            head = turn.scores(rows[start:stop]).copy()
            found.number[start:stop] = heads.top(head, shape[1])[1]
            _rank(
                rows[start:stop], self.centroids, found.score[start:stop], found.number[start:stop]
            )

        each_tile(len(rows), TILE_ROWS, tile)
        return Neighbours(found.score[:, :count], found.number[:, :count])

    def assign(self, rows: Floats) -> Ints:
        """The nearest cell of each row (n,)."""
        return self.nearest(rows, 1).number[:, 0].copy()


@numba.njit(nogil=True, cache=True)
def _rank(rows: Floats, centroids: Floats, score: Floats, number: Ints) -> None:
    """Orders the chosen cells of each row by their true scores, equal ones by number."""
    for i in range(rows.shape[0]):
        number[i] = np.sort(number[i])
        for slot in range(number.shape[1]):
            score[i, slot] = fast_dot(rows[i], centroids[number[i, slot]])
        order = np.argsort(-score[i], kind="mergesort")
        score[i], number[i] = score[i][order], number[i][order]


def _tree(sample: Floats, count: int, rng: np.random.Generator) -> Floats:
    """About `count` centroids: k-means, and within each of its groups k-means again."""
    if count <= FLAT:
        return _even(sample, count, rng)
    groups = centroids_of(sample, round(np.sqrt(count)), rng)
    group = Assigner()(sample, groups)
    within = [np.flatnonzero(group == number) for number in range(len(groups))]
    seeds = rng.integers(0, 2**63, len(groups))
    parts = [groups[:0]] * len(groups)

    def part(number: int) -> None:
        mine = within[number]
        share = max(1, round(count * len(mine) / len(sample)))
        if len(mine):
            parts[number] = _even(sample[mine], share, np.random.default_rng(seeds[number]))

    each(len(groups), part)
    return np.concatenate(parts)


def _even(rows: Floats, count: int, rng: np.random.Generator) -> Floats:
    """About `count` centroids of rows (n, D), those cut again that hold far more than their share.

    Most queries ask in large cells: even ones are read less.
    """
    centroids = centroids_of(rows, count, rng)
    for _ in range(SPLITS):
        cell = Assigner()(rows, centroids)
        share = np.bincount(cell, minlength=len(centroids)) * (count / len(rows))
        pieces = share.astype(int)
        order = rng.permutation(len(rows))
        order = order[np.argsort(cell[order], kind="stable")]
        starts = np.searchsorted(cell[order], np.arange(len(centroids)))
        cut = np.flatnonzero(pieces > 1)
        if not len(cut):
            break
        members = np.concatenate([order[starts[c] : starts[c] + pieces[c]] for c in cut])
        centroids = _moved(rows, np.concatenate([centroids[pieces <= 1], rows[members]]), 3)
    return centroids


def centroids_of(rows: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Spherical k-means of rows (n, D), a few iterations from random rows."""
    chosen = rng.choice(len(rows), min(count, len(rows)), replace=False)
    return _moved(rows, rows[np.sort(chosen)], ITERATIONS)


def _moved(rows: Floats, start: Floats, iterations: int) -> Floats:
    sweep = BlockSweep(lambda: [rows], Metric(), Assigner)
    return lloyd(Clustering(start, ()), sweep, iterations, Metric()).centroids
