"""Cells: coarse centroids that say where a row's neighbours lie, found through fewer, coarser ones.

A tree of two levels: k-means of a sample, and k-means again within each of its groups. The number
of cells grows with the base, so that a cell stays small; the way to them costs about its root.
"""

from dataclasses import dataclass, replace

import numpy as np

from curation.algorithms.assign import Assigner
from curation.algorithms.best import Best, Neighbours
from curation.algorithms.lloyd import Clustering, Metric, Totals, lloyd
from curation.algorithms.products import Floats, Ints, each, each_tile
from curation.algorithms.search import Base, Queries, Visits, search

SPLITS = 2
FLAT = 256  # up to so many cells all are compared
ITERATIONS = 6
SAMPLE_PER_CELL = 32
AGREEMENT = 0.995  # of rows whose nearest cell must be found through the groups
TILE_ROWS = 8192


@dataclass(frozen=True)
class Cells:
    """Unit centroids in order of their groups, and the groups' own centroids (g, D).

    A row looks in its `beam` nearest groups; with all of them the nearest cells are exact.
    """

    base: Base
    groups: Floats
    beam: int

    @classmethod
    def fit(cls, sample: Floats, count: int, rng: np.random.Generator) -> "Cells":
        """About `count` cells of unit rows (n, D), at most n; zeros have no direction and no say."""
        told = sample[sample.any(axis=1)]
        sample = told if len(told) else np.eye(1, sample.shape[1], dtype=np.float32)
        count = max(1, min(count, len(sample)))
        if count <= FLAT:
            centroids = _centroids(sample, count, rng)
            return cls._of(centroids, centroids.mean(axis=0, keepdims=True), 1)
        groups = _centroids(sample, round(np.sqrt(count)), rng)
        group, _ = Assigner()(sample, groups)
        within = [np.flatnonzero(group == number) for number in range(len(groups))]
        seeds = rng.integers(0, 2**63, len(groups))
        parts: list[Floats] = [groups[:0]] * len(groups)

        def part(number: int) -> None:
            mine = within[number]
            share = max(1, round(count * len(mine) / len(sample)))
            if len(mine):
                seeded = np.random.default_rng(seeds[number])
                parts[number] = _split(sample[mine], share, seeded)

        each(len(groups), part)
        cells = cls._of(np.concatenate(parts), groups, 4)
        return cells._with_beam(sample[rng.choice(len(sample), min(2048, len(sample)), False)])

    @classmethod
    def _of(cls, centroids: Floats, groups: Floats, beam: int) -> "Cells":
        group, _ = Assigner()(centroids, groups)
        used, group = np.unique(group, return_inverse=True)  # a row must not look in empty groups
        order = np.argsort(group, kind="stable")
        base = Base.of(centroids[order], np.arange(len(centroids)), group[order], len(used))
        return cls(base, groups[used], min(beam, len(used)))

    def __len__(self) -> int:
        return len(self.base.rows)

    def wider(self) -> "Cells":
        """Looks in twice as many groups."""
        return replace(self, beam=min(2 * self.beam, len(self.groups)))

    def exact(self) -> "Cells":
        """Looks in all groups."""
        return replace(self, beam=len(self.groups))

    def _with_beam(self, sample: Floats) -> "Cells":
        truth, _ = Assigner()(sample, self.base.rows)
        cells = self
        while cells.beam < len(self.groups):
            if (cells.assign(sample) == truth).mean() >= AGREEMENT:
                break
            cells = cells.wider()
        return cells

    def nearest(self, rows: Floats, count: int) -> Neighbours:
        """The `count` nearest cells of rows (n, D), nearest first, NONE where there are fewer."""
        count = min(count, len(self))
        found = Neighbours(
            np.empty((len(rows), count), np.float32), np.empty((len(rows), count), np.int64)
        )
        whole = Base(self.groups, np.arange(len(self.groups)), np.array([0, len(self.groups)]))

        def tile(start: int, stop: int) -> None:
            asked = Queries(rows[start:stop], np.arange(stop - start))
            groups, best = Best(stop - start, self.beam), Best(stop - start, count)
            search(asked, Visits.of(np.zeros((stop - start, 1), np.int64), 1), whole, groups)
            search(asked, Visits.of(groups.number, len(self.groups)), self.base, best)
            nearest = best.sorted()
            found.score[start:stop], found.number[start:stop] = nearest.score, nearest.number

        each_tile(len(rows), TILE_ROWS, tile)
        return found

    def assign(self, rows: Floats) -> Ints:
        """The nearest cell of each row (n,)."""
        return self.nearest(rows, 1).number[:, 0]


def _split(rows: Floats, count: int, rng: np.random.Generator) -> Floats:
    """About `count` centroids of rows (n, D), those cut again that hold far more than their share.

    Most queries ask in large cells: even ones are read less.
    """
    centroids = _centroids(rows, count, rng)
    for _ in range(SPLITS):
        cell, _ = Assigner()(rows, centroids)
        share = np.bincount(cell, minlength=len(centroids)) * (count / len(rows))
        pieces = np.rint(share).astype(int)
        order = rng.permutation(len(rows))
        order = order[np.argsort(cell[order], kind="stable")]
        starts = np.searchsorted(cell[order], np.arange(len(centroids)))
        cut = np.flatnonzero(pieces > 1)
        if not len(cut):
            break
        members = np.concatenate([order[starts[c] : starts[c] + pieces[c]] for c in cut])
        centroids = _moved(rows, np.concatenate([centroids[pieces <= 1], rows[members]]), 3)
    return centroids


def _centroids(rows: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Spherical k-means of rows (n, D), a few iterations from random rows."""
    chosen = rng.choice(len(rows), min(count, len(rows)), replace=False)
    return _moved(rows, rows[np.sort(chosen)], ITERATIONS)


def _moved(rows: Floats, start: Floats, iterations: int) -> Floats:
    assigner = Assigner()

    def sweep(centroids: Floats) -> Totals:
        totals = Totals.empty(*centroids.shape)
        totals.add(rows, *assigner(rows, centroids), Metric())
        return totals

    return lloyd(Clustering(start, ()), sweep, iterations, Metric()).centroids
