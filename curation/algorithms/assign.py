"""The nearest centroid of every row, exactly, and fast when the centroids hardly move.

Score of a row and a centroid: row . centroid for unit centroids (the cosine, spherical k-means),
minus half the centroid's square for plain k-means, where the largest score is the smallest
distance. Products may be rounded: whatever could be the largest within that error is compared in
fp64, so the answer doesn't depend on precision, tiles or threads. Equal scores go to the smaller
number; a centroid equal to one before it gets no rows.
"""

from collections.abc import Callable

import numba
import numpy as np
import torch

from curation.algorithms import bounds, gpu
from curation.algorithms.bounds import Bounds, Call, Columns, Moves
from curation.algorithms.equal import first_of_equal
from curation.algorithms.gpu_assign import GpuAssigner
from curation.algorithms.lloyd import Assign
from curation.algorithms.products import (
    ROUNDED,
    TILE_ROWS,
    Doubles,
    Floats,
    Ids,
    Ints,
    Products,
    exact_dot,
    fast_dtype,
    gathered,
    lost,
    square_norms,
)
from curation.algorithms.tiles import each_tile, one_a_product

NEAR = 10  # centroids remembered for each row
SHARES = (0.0, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.4)  # of the centroids, those that moved most
OVERHEAD = 0.2  # of trying any: rows are gathered, and what comes near is scored again
COST = np.array([0.0, *(OVERHEAD + share for share in SHARES[1:]), 2.0], np.float32)
ALL = len(SHARES)
MOST_CALLS = 32  # whose centroids are kept
ROUNDING = 1e-6  # of |row| |centroid|: what adding up bounds in fp32 may lose


def assign(rows: Floats, centroids: Floats, spherical: bool = True) -> tuple[Ints, Floats]:
    """The nearest of `centroids` (k, D) for each of `rows` (n, D): number (n,), score (n,)."""
    cluster = assigner(spherical)(rows, centroids)
    return cluster, scores_of(rows, centroids, cluster, spherical)


def assigner(spherical: bool = True) -> Assign:
    """What assigns the same rows again and again: on a GPU, if there is one."""
    return GpuAssigner(spherical) if gpu.device() else Assigner(spherical)


def scores_of(rows: Floats, centroids: Floats, cluster: Ints, spherical: bool = True) -> Floats:
    """The score (n,) of each row (n, D) and the centroid (k, D) that `cluster` (n,) names."""
    score, bias = np.empty(len(rows), np.float32), _columns(centroids, spherical).bias
    state = (rows, centroids, bias, cluster, score)
    each_tile(len(rows), TILE_ROWS, lambda a, b: _scores(a, b, *state))
    return score


class Assigner:
    """Assigns the same rows (n, D) again and again to centroids that move between the calls.

    For each row it keeps the `NEAR` best centroids with what they scored, and a bound that no other
    exceeded when all were last compared. A score rises or falls by no more than its centroid has
    moved. So a call first asks whether the row's centroid can have been passed: in late iterations
    mostly not, and the row isn't even read. Else those that may have passed it are scored again:
    near ones, and of the others those that lie so far from where they were that the bound doesn't
    rule them out. A row for which that has cost as much as comparing all has all compared again.
    These are the bounds of Hamerly (SDM 2010) and of Drake and Hamerly (2012), with one bound a
    row and the movement of each centroid by itself. Held between calls: 94 bytes a row, and the
    centroids of the calls whose bounds are in use.
    """

    def __init__(self, spherical: bool = True) -> None:
        self._spherical = spherical
        self._known = Bounds.unknown(0, 0)
        self._columns: dict[int, Columns] = {}
        self._now = -1
        self._longest = self._lost = 0.0

    def __call__(self, rows: Floats, centroids: Floats) -> Ints:
        """Number (n,) of the nearest centroid of every row."""
        with one_a_product():
            return self._assign(rows, centroids)

    def _assign(self, rows: Floats, centroids: Floats) -> Ints:
        to = _columns(centroids, self._spherical)
        if self._is_new(to, len(rows)):
            self._known = Bounds.unknown(len(rows), min(NEAR, len(centroids)))
            self._longest = float(np.sqrt(square_norms(rows).max(initial=0.0)))
            self._lost = lost(rows, fast_dtype())
            self._columns, self._now = {0: to}, 0
            self._search(rows, np.arange(len(rows)), fast_dtype())
        else:
            self._now += 1
            self._columns[self._now] = to
            self._update(rows)
            self._forget(rows)
        return self._known.nearest()

    def _is_new(self, to: Columns, count: int) -> bool:
        """Whether no bound holds: at first, or when a repeated centroid has moved off its twin."""
        if self._now < 0 or len(self._known.rest) != count:
            return True
        before = self._columns[self._now].bias
        return before.shape != to.bias.shape or bool(np.any(np.isinf(before) & ~np.isinf(to.bias)))

    def _update(self, rows: Floats) -> None:
        """Looks at the rows whose nearest centroid may be another one now."""
        known, to, moves = self._known, self._columns[self._now], self._moves()
        limits = np.array([int(share * len(to.bias)) for share in SHARES])
        group = np.zeros(len(rows), np.uint8)
        state = (rows, to, known, moves, self._call(), limits, group)
        each_tile(len(rows), TILE_ROWS, lambda a, b: bounds.look(a, b, *state))
        known.spent[:] += COST[group]
        group[(known.spent > 1) & (group > 0)] = ALL
        some = np.flatnonzero((group > 0) & (group < ALL))
        kind = known.searched[some].astype(np.int32) * ALL + group[some]
        some = some[np.argsort(kind, kind="stable")]
        kinds, starts = np.unique(np.sort(kind), return_index=True)
        for one, mine in zip(kinds.tolist(), np.split(some, starts)[1:], strict=True):
            moved = moves.by[moves.place[one // ALL]]
            order = np.argsort(-moved, kind="stable")
            far = np.sort(order[: limits[one % ALL]]).astype(np.int32)
            self._try(rows, mine, far, moved)
        self._search(rows, np.flatnonzero(group == ALL), fast_dtype())

    def _try(self, rows: Floats, chosen: Ints, far: Ids, moved: Floats) -> None:
        """Scores the centroids `far` for some rows; those that come near are remembered."""
        known, to, call = self._known, self._columns[self._now], self._call()
        products = Products(to.centroids[far], to.small[far])
        state = (far, moved, rows, to, known, call)

        def tile(mine: Ints, here: Floats) -> None:
            floors = bounds.floors(mine, known, call)
            at_row, at_column = products.reaching(here, floors)
            bounds.offer(mine, at_row, at_column, *state)

        _each_chosen(rows, chosen, products.tile_rows, tile)

    def _search(self, rows: Floats, chosen: Ints, dtype: torch.dtype) -> None:
        """Scores all centroids for some rows."""
        known, to, call = self._known, self._columns[self._now], self._call()
        products, state = Products(to.centroids, to.small, dtype), (rows, to, known, call)

        def tile(mine: Ints, here: Floats) -> None:
            best, at = products.top(here, NEAR + 1)
            bounds.remember(mine, best, at, *state)

        def crowd(mine: Ints, here: Floats) -> None:
            bounds.settle_crowd(mine, products.scores(here), *state)

        _each_chosen(rows, chosen, products.tile_rows, tile)
        slack = self._slack(dtype)
        in_doubt = chosen[known.score[chosen].max(axis=1) < known.rest[chosen] + slack]
        if len(in_doubt) and dtype != torch.float32:
            self._search(rows, in_doubt, torch.float32)
        elif len(in_doubt):  # more centroids equally near than are remembered
            _each_chosen(rows, in_doubt, TILE_ROWS, crowd)

    def _call(self) -> Call:
        slack = (np.float32(self._slack(dtype)) for dtype in (torch.float32, fast_dtype()))
        return Call(self._now, *slack)

    def _slack(self, dtype: torch.dtype) -> float:
        """Scores that differ by less may be in the wrong order."""
        centroids = self._columns[self._now].centroids
        row, column, lost_of_column = self._longest, _longest(centroids), lost(centroids, dtype)
        lost_of_row = self._lost if dtype != torch.float32 else 0.0
        rounded = (row + lost_of_row) * (column + lost_of_column)
        off = rounded * ROUNDED[dtype] + row * lost_of_column + column * lost_of_row
        return 2 * (off + lost_of_row * lost_of_column)

    def _moves(self) -> Moves:
        to = self._columns[self._now]
        still = np.isinf(to.bias)  # a repeated one: nothing comes near it
        place = np.zeros(self._now + 1, np.int64)
        by = np.empty((len(self._columns), len(still)), np.float32)
        for at, (call, before) in enumerate(self._columns.items()):
            place[call] = at
            shift = np.abs(np.where(still, 0, to.bias) - np.where(still, 0, before.bias))
            apart = np.linalg.norm(to.centroids - before.centroids, axis=1)
            by[at] = np.where(still, 0, self._longest * apart + shift)
        by += ROUNDING * self._longest * _longest(to.centroids)
        return Moves(place, by, -np.sort(-by, axis=1))

    def _forget(self, rows: Floats) -> None:
        """Keeps the centroids of calls whose bounds are in use, and not too many of them."""
        known = self._known
        in_use = np.union1d(np.unique(known.looked), np.unique(known.searched))
        if len(in_use) > MOST_CALLS:
            oldest = (known.looked == in_use[0]) | (known.searched == in_use[0])
            self._search(rows, np.flatnonzero(oldest), fast_dtype())
            in_use = in_use[1:]
        keep = {*in_use.tolist(), self._now}
        self._columns = {call: kept for call, kept in self._columns.items() if call in keep}


def _each_chosen(
    rows: Floats, chosen: Ints, size: int, use: Callable[[Ints, Floats], None]
) -> None:
    """use(chosen, rows[chosen]) for tiles of the chosen rows."""

    def tile(start: int, stop: int) -> None:
        use(chosen[start:stop], gathered(rows, chosen[start:stop]))

    each_tile(len(chosen), size, tile)


def _longest(centroids: Floats) -> float:
    return float(np.sqrt(np.einsum("kd,kd->k", centroids, centroids).max(initial=0.0)))


def _columns(centroids: Floats, spherical: bool) -> Columns:
    """With a bias of minus infinity for a centroid that was there before."""
    wide = centroids.astype(np.float64)
    bias = np.zeros(len(wide)) if spherical else -0.5 * np.einsum("kd,kd->k", wide, wide)
    bias[first_of_equal(centroids) != np.arange(len(wide))] = -np.inf
    return Columns(centroids, bias, bias.astype(np.float32))


@numba.njit(nogil=True, cache=True)
def _scores(
    start: int,
    stop: int,
    rows: Floats,
    centroids: Floats,
    bias: Doubles,
    cluster: Ints,
    score: Floats,
) -> None:
    for i in range(start, stop):
        score[i] = exact_dot(rows[i], centroids[cluster[i]]) + bias[cluster[i]]
