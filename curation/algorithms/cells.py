"""Cells: coarse centroids that say where a row's neighbours lie, found through fewer, coarser ones.

A tree of two levels: k-means of a sample, and k-means again within each of its groups. The number
of cells grows with the base, so that a cell stays small; the way to them costs about its root.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numba
import numpy as np

from curation.algorithms.assign import Assigner
from curation.algorithms.best import NONE, Best, Neighbours
from curation.algorithms.lloyd import Clustering, Metric, Totals, lloyd
from curation.algorithms.products import Floats, Ints, each, each_tile, exact_dot
from curation.algorithms.search import Base, Queries, Visits, search

SPLITS = 2
FLAT = 256  # up to so many cells all are compared
ITERATIONS = 6
SAMPLE_PER_CELL = 32
AGREEMENT = 0.995  # of rows whose nearest cell must be found through the groups
LOSS = 3e-4  # of the mean score that k-means may lose so: a row that sees no near group loses much
AGREEMENT_ROWS = 2048  # on which that is measured
TILE_ROWS = 8192
MANY = 16_384  # above so many centroids k-means looks for the nearest through groups
FINALISTS = 2  # compared exactly


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
        """About `count` cells of unit rows (n, D), at most n. Zeros have no direction nor a say."""
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
                parts[number] = _split(
                    sample[mine], _centroids(sample[mine], share, seeded), seeded
                )

        each(len(groups), part)
        cells = cls._of(np.concatenate(parts), groups, 4)
        tried = sample[rng.choice(len(sample), min(AGREEMENT_ROWS, len(sample)), False)]
        return cells._with_beam(tried, cells.base.rows)

    @classmethod
    def over(cls, centroids: Floats, rows: Floats) -> "Cells":
        """Given unit centroids (k, D) as cells, found as well as rows (s, D) need it.

        Numbers are those of the given centroids. About sqrt(k) groups, from a sample of them.
        """
        count, rng = max(1, round(np.sqrt(len(centroids)))), np.random.default_rng(0)
        drawn = min(len(centroids), SAMPLE_PER_CELL * count)
        chosen = np.sort(rng.choice(len(centroids), drawn, replace=False))
        groups = _centroids(centroids[chosen], count, rng)
        group, _ = Assigner()(centroids, groups)
        used, group = np.unique(group, return_inverse=True)
        base = Base.of(centroids, np.arange(len(centroids)), group, len(used))
        return cls(base, groups[used], min(4, len(used)))._with_beam(rows, centroids, LOSS)

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

    def _with_beam(self, sample: Floats, centroids: Floats, loss: float = float("inf")) -> "Cells":
        if not len(sample):
            return self
        _, best = Assigner()(sample, centroids)
        cells = self
        while cells.beam < len(self.groups):
            found = cells.nearest(sample, 1).score[:, 0]
            agree = (found >= best - 1e-6).mean()  # another as near will do
            if agree >= AGREEMENT and (best - found).mean() <= loss:
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


class GroupedAssigner:
    """Assigns rows to very many unit centroids, looking only near: nearly always the nearest.

    The centroids are put in about sqrt(k) groups, and each row is compared with those of its
    `beam` nearest groups: as many as it takes to find the nearest of all for AGREEMENT of a
    sample of the rows, and all of the sample's mean score but LOSS. The centroid of the row's
    last call is compared as well, so that Lloyd's objective doesn't fall because a row lost
    sight of it. The finalists are compared in fp64.

    A call depends on the rows of the block, the centroids, and the last call; not on threads.
    Between calls it holds 8 bytes a row; in a call 24 bytes a row more, a second copy of the
    centroids in order of groups, and for each thread the scores of 512 x 2,048 pairs. (What
    compares all holds 46 bytes a row and the centroids of several calls.)
    """

    def __init__(self, spherical: bool = True) -> None:
        if not spherical:
            raise ValueError("centroids are grouped by direction: plain k-means compares with all")
        self._before = np.empty(0, np.int64)

    def __call__(self, rows: Floats, centroids: Floats) -> tuple[Ints, Floats]:
        """Number (n,) and score (n,) of the nearest centroid that was found for every row."""
        if len(self._before) != len(rows):
            self._before = np.full(len(rows), NONE)
        self._before[self._before >= len(centroids)] = NONE
        tried = min(AGREEMENT_ROWS, len(rows))
        chosen = np.sort(np.random.default_rng(0).choice(len(rows), tried, replace=False))
        near = Cells.over(centroids, rows[chosen]).nearest(rows, FINALISTS).number
        cluster, score = np.empty(len(rows), np.int64), np.empty(len(rows), np.float32)
        state = (rows, centroids, near, self._before, cluster, score)
        each_tile(len(rows), TILE_ROWS, lambda a, b: _settle(a, b, *state))
        self._before = cluster.copy()
        return cluster, score


def make_assigner(spherical: bool) -> Callable[[Floats, Floats], tuple[Ints, Floats]]:
    """What finds the nearest centroids of one block, exactly up to MANY unit centroids.

    Above that each call stands for itself, so that a resumed fit is one that never stopped.
    """
    exact = Assigner(spherical)

    def assign(rows: Floats, centroids: Floats) -> tuple[Ints, Floats]:
        if spherical and len(centroids) > MANY:
            return GroupedAssigner()(rows, centroids)
        return exact(rows, centroids)

    return assign


@numba.njit(nogil=True, cache=True)
def _settle(
    start: int,
    stop: int,
    rows: Floats,
    centroids: Floats,
    near: Ints,
    before: Ints,
    cluster: Ints,
    score: Floats,
) -> None:
    """The nearest of the near ones and of the one before, of equal ones the first."""
    for i in range(start, stop):
        best, at = -np.inf, np.int64(NONE)
        for slot in range(near.shape[1] + 1):
            j = near[i, slot] if slot < near.shape[1] else before[i]
            if j != NONE:
                exact = exact_dot(rows[i], centroids[j])
                if at == NONE or exact > best or (exact == best and j < at):
                    best, at = exact, j
        cluster[i], score[i] = at, best


def _split(rows: Floats, centroids: Floats, rng: np.random.Generator) -> Floats:
    """Cuts cells that hold far more than their share: large cells are asked by most queries."""
    for _ in range(SPLITS):
        cell, _ = Assigner()(rows, centroids)
        pieces = np.rint(np.bincount(cell, minlength=len(centroids)) / SAMPLE_PER_CELL).astype(int)
        cut = [_centroids(rows[cell == c], pieces[c], rng) for c in np.flatnonzero(pieces > 1)]
        centroids = np.concatenate([centroids[pieces <= 1], *cut])
    return centroids


def _centroids(rows: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Spherical k-means of rows (n, D), a few iterations from random rows."""
    count = min(count, len(rows))
    start = rows[np.sort(rng.choice(len(rows), count, replace=False))]
    assigner = Assigner()

    def sweep(centroids: Floats) -> Totals:
        totals = Totals.empty(*centroids.shape)
        totals.add(rows, *assigner(rows, centroids), Metric())
        return totals

    return lloyd(Clustering(start, ()), sweep, ITERATIONS, Metric()).centroids
