"""The nearest of very many centroids, nearly always: looked for in a few groups of them."""

from dataclasses import dataclass, replace

import numba
import numpy as np

from curation.algorithms.assign import Assigner, assign
from curation.algorithms.best import NONE, Best, Neighbours
from curation.algorithms.cells import centroids_of
from curation.algorithms.lloyd import Assign
from curation.algorithms.products import Floats, Ints, each_tile, exact_dot
from curation.algorithms.search import Base, Queries, Visits, search

SAMPLE_PER_GROUP = 32
AGREEMENT = 0.995  # of rows whose nearest centroid must be found
AGREEMENT_ROWS = 2048  # on which that is measured
TILE_ROWS = 8192
SAMPLE_SEED = (3, 14, 15)  # nobody else's: a fit of seed 0 may have begun from the rows of seed 0
MANY = 16_384  # above so many centroids k-means looks for the nearest through groups
FINALISTS = 2  # compared exactly


@dataclass(frozen=True)
class Groups:
    """Unit centroids in order of their groups, and the groups' own centroids (g, D).

    A row looks in its `beam` nearest groups; with all of them the nearest centroids are exact.
    """

    base: Base
    groups: Floats
    beam: int

    @classmethod
    def over(cls, centroids: Floats, rows: Floats) -> "Groups":
        """Given unit centroids (k, D), found as well as rows (s, D) need it.

        Numbers are those of the given centroids. About sqrt(k) groups, from a sample of them.
        """
        count, rng = max(1, round(np.sqrt(len(centroids)))), np.random.default_rng(SAMPLE_SEED)
        drawn = min(len(centroids), SAMPLE_PER_GROUP * count)
        chosen = np.sort(rng.choice(len(centroids), drawn, replace=False))
        groups = centroids_of(centroids[chosen], count, rng)
        group = Assigner()(centroids, groups)
        used, group = np.unique(group, return_inverse=True)
        base = Base.of(centroids, np.arange(len(centroids)), group, len(used))
        return cls(base, groups[used], min(4, len(used)))._with_beam(rows, centroids)

    def _with_beam(self, sample: Floats, centroids: Floats) -> "Groups":
        if not len(sample):
            return self
        _, best = assign(sample, centroids)
        found_by = self
        while found_by.beam < len(self.groups):
            found = found_by.nearest(sample, 1).score[:, 0]
            if (found >= best - 1e-6).mean() >= AGREEMENT:  # another as near will do
                break
            found_by = replace(found_by, beam=min(2 * found_by.beam, len(self.groups)))
        return found_by

    def nearest(self, rows: Floats, count: int) -> Neighbours:
        """The `count` nearest centroids of rows (n, D), nearest first, NONE where none is left."""
        count = min(count, len(self.base.rows))
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


class GroupedAssigner:
    """Assigns rows to very many unit centroids, looking only near: nearly always the nearest.

    The centroids are put in about sqrt(k) groups, and each row is compared with those of its
    `beam` nearest groups: as many as it takes to find the nearest of all for AGREEMENT of a
    sample of the rows. The centroid of the row's last call is compared as well, so that Lloyd's
    objective doesn't fall because a row lost sight of it. The finalists are compared in fp64.

    A call depends on the rows of the block, the centroids, and the last call; not on threads.
    Between calls it holds 8 bytes a row; in a call 24 bytes a row more, a second copy of the
    centroids in order of groups, and for each thread the scores of 512 x 2,048 pairs. (What
    compares all holds 46 bytes a row and the centroids of several calls.)
    """

    def __init__(self, spherical: bool = True) -> None:
        if not spherical:
            raise ValueError("centroids are grouped by direction: plain k-means compares with all")
        self._before = np.empty(0, np.int64)

    def __call__(self, rows: Floats, centroids: Floats) -> Ints:
        """Number (n,) of the nearest centroid that was found for every row."""
        if len(self._before) != len(rows):
            self._before = np.full(len(rows), NONE)
        self._before[self._before >= len(centroids)] = NONE
        tried = min(AGREEMENT_ROWS, len(rows))
        chosen = np.sort(np.random.default_rng(SAMPLE_SEED).choice(len(rows), tried, replace=False))
        near = Groups.over(centroids, rows[chosen]).nearest(rows, FINALISTS).number
        cluster = np.empty(len(rows), np.int64)
        state = (rows, centroids, near, self._before, cluster)
        each_tile(len(rows), TILE_ROWS, lambda a, b: _settle(a, b, *state))
        self._before = cluster.copy()
        return cluster


def make_assigner(spherical: bool) -> Assign:
    """What finds the nearest centroids of one block, exactly up to MANY unit centroids.

    Above that each call stands for itself, so that a resumed fit is one that never stopped.
    """
    exact = Assigner(spherical)

    def nearest(rows: Floats, centroids: Floats) -> Ints:
        if spherical and len(centroids) > MANY:
            return GroupedAssigner()(rows, centroids)
        return exact(rows, centroids)

    return nearest


@numba.njit(nogil=True, cache=True)
def _settle(
    start: int,
    stop: int,
    rows: Floats,
    centroids: Floats,
    near: Ints,
    before: Ints,
    cluster: Ints,
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
        cluster[i] = at
