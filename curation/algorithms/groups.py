"""The nearest of very many centroids, nearly always: looked for in a few groups of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numba
import numpy as np

from curation.algorithms import gpu
from curation.algorithms.assign import assign, assigner
from curation.algorithms.best import Best, Neighbours
from curation.algorithms.lloyd import Assign, BlockSweep, Clustering, Metric, lloyd
from curation.algorithms.products import NONE, Floats, Ints, exact_dot
from curation.algorithms.search import search
from curation.algorithms.tiles import each_tile
from curation.algorithms.visits import Base, Rows, Visits

SAMPLE_PER_GROUP = 32
ITERATIONS = 6
AGREEMENT = 0.995  # of rows whose nearest centroid must be found
AGREEMENT_ROWS = 2048  # on which that is measured
TILE_ROWS, GPU_TILE_ROWS = 8192, 131_072
SAMPLE_SEED = (3, 14, 15)
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
        groups = _centroids(centroids[chosen], count, rng)
        group = assigner()(centroids, groups)
        used, group = np.unique(group, return_inverse=True)
        base = Base.of(Rows(centroids, np.arange(len(centroids))), group, len(used))
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
        groups = Rows(self.groups, np.arange(len(self.groups)))
        whole = Base.in_order(groups, np.array([0, len(groups)]))

        def tile(start: int, stop: int) -> None:
            asked = Rows(rows[start:stop], np.arange(stop - start))
            near, best = Best(stop - start, self.beam), Best(stop - start, count)
            search(asked, Visits.of(np.zeros((stop - start, 1), np.int64), 1), whole, near)
            search(asked, Visits.of(near.number, len(self.groups)), self.base, best)
            nearest = best.sorted()
            found.score[start:stop], found.number[start:stop] = nearest.score, nearest.number

        each_tile(len(rows), GPU_TILE_ROWS if gpu.device() else TILE_ROWS, tile)
        return found

    def assign(self, rows: Floats, centroids: Floats) -> Ints:
        """Number (n,) of the nearest of the centroids (k, D) that is found for rows (n, D)."""
        near, cluster = self.nearest(rows, FINALISTS).number, np.empty(len(rows), np.int64)
        state = (rows, centroids, near, cluster)
        each_tile(len(rows), TILE_ROWS, lambda a, b: _settle(a, b, *state))
        return cluster


class GroupedAssigner:
    """Assigns rows to very many unit centroids, looking only near: nearly always the nearest.

    The centroids are put in about sqrt(k) groups, and each row is compared with those of its
    `beam` nearest groups: as many as it takes to find the nearest of all for AGREEMENT of `probe`
    (s, D), rows like those that will be asked for. The finalists are compared in fp64.

    What a row gets depends on the row, the centroids and the probe: one assigner serves all blocks
    of a fit, and `Groups` made elsewhere of the same probe give the same. Held between calls: the
    last centroids and the order of their groups; in a call 24 bytes a row, and for each thread the
    scores of 512 x 2,048 pairs. (What compares all holds 100 bytes a row and the
    centroids of several calls.)
    """

    def __init__(self, probe: Floats) -> None:
        self._probe = probe
        self._of: Floats | None = None
        self._groups: Groups

    def __call__(self, rows: Floats, centroids: Floats) -> Ints:
        """Number (n,) of the nearest centroid that was found for every row."""
        if centroids is not self._of:
            self._of, self._groups = centroids, Groups.over(centroids, self._probe)
        return self._groups.assign(rows, centroids)


def assigners(spherical: bool, k: int, probe: Callable[[], Floats]) -> Callable[[bool], Assign]:
    """Makes what finds the nearest of k centroids for each block of a fit.

    Exactly up to MANY unit centroids; above, all blocks share groups that are fit for the rows that
    `probe` gives.
    """
    if not spherical or k <= MANY:  # centroids are grouped by direction
        return assigner
    shared = GroupedAssigner(probe())
    return lambda _: shared


def _centroids(rows: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Spherical k-means of rows (n, D), a few iterations from random rows."""
    chosen = np.sort(rng.choice(len(rows), min(count, len(rows)), replace=False))
    sweep = BlockSweep(lambda: [rows], Metric(), assigner)
    return lloyd(Clustering(rows[chosen], ()), sweep, ITERATIONS, Metric()).centroids


@numba.njit(nogil=True, cache=True)
def _settle(
    start: int, stop: int, rows: Floats, centroids: Floats, near: Ints, cluster: Ints
) -> None:
    """The nearest of the near ones, of equal ones the first."""
    for i in range(start, stop):
        best, at = -np.inf, np.int64(NONE)
        for slot in range(near.shape[1]):
            j = near[i, slot]
            if j != NONE:
                exact = exact_dot(rows[i], centroids[j])
                if at == NONE or exact > best or (exact == best and j < at):
                    best, at = exact, j
        cluster[i] = at
