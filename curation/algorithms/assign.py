"""The nearest centroid of every row, exactly, and fast when the centroids hardly move.

Score of a row and a centroid: row . centroid for unit centroids (the cosine, spherical k-means),
minus half the centroid's square for plain k-means, where the largest score is the smallest
distance. Products may be rounded: whatever could be the largest within that error is compared in
fp64, so the answer doesn't depend on precision, tiles or threads. Equal scores go to the smaller
number; a centroid equal to one before it gets no rows.
"""

from dataclasses import dataclass, field

import numba
import numpy as np
import torch

from curation.algorithms.products import (
    SLACK,
    Doubles,
    Floats,
    Ids,
    Ints,
    Products,
    each_tile,
    exact_dot,
    fast_dot,
    fast_dtype,
    gathered,
    top_of_row,
)

TILE_ROWS = 1024
NEAR = 8  # centroids remembered for each row
SHARES = (0.0, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.4)  # of the centroids, those that moved most
COST = np.array([*SHARES, 2.0], np.float32)


def assign(rows: Floats, centroids: Floats, spherical: bool = True) -> tuple[Ints, Floats]:
    """The nearest of `centroids` (k, D) for each of `rows` (n, D): number (n,), score (n,)."""
    return Assigner(spherical)(rows, centroids)


class Assigner:
    """Assigns the same rows (n, D) again and again to centroids that move between the calls.

    For each row it keeps the `NEAR` best centroids, and a bound that no other exceeded when all
    were last compared. A call scores the near ones again, and of the others those that lie so far
    from where they were then that the bound doesn't rule them out: usually few. A row for which
    that has cost as much as comparing all has all compared again. These are the bounds of Hamerly
    (SDM 2010) and of Drake and Hamerly (2012), with one bound a row and the movement of each
    centroid by itself. Between calls it holds 42 bytes a row and the centroids of the calls whose
    bounds are in use, in a call 32 bytes a row more.
    """

    def __init__(self, spherical: bool = True) -> None:
        self._spherical = spherical
        self._longest: float | None = None
        self._centroids = np.empty((0, 0), np.float32)
        self._bias = np.empty(0)

    def __call__(self, rows: Floats, centroids: Floats) -> tuple[Ints, Floats]:
        """Number (n,) and score (n,) of the nearest centroid of every row."""
        count, bias = len(rows), _bias(centroids, self._spherical)
        if self._longest is None:
            self._longest = _longest(rows)
        task = _Task(rows, centroids, bias, self._longest)
        if self._is_new(task):
            width = min(NEAR, len(centroids))
            self._near = np.empty((count, width), np.int32)
            self._rest = np.empty(count, np.float32)
            self._epoch = np.zeros(count, np.int16)
            self._spent = np.zeros(count, np.float32)
            self._calls, self._reference = 0, {0: (centroids, bias)}
            task.scores = np.empty((count, width), np.float32)
            self._search(task, np.arange(count), fast_dtype())
        else:
            self._update(task)
        self._centroids, self._bias = centroids, bias
        cluster, score = np.empty(count, np.int64), np.empty(count, np.float32)
        near = (self._near, task.scores, np.float32(task.slack(torch.float32)))
        each_tile(
            count,
            TILE_ROWS,
            lambda a, b: _settle(a, b, rows, centroids, bias, *near, cluster, score),
        )
        return cluster, score

    def _is_new(self, task: "_Task") -> bool:
        """Whether no bound holds: at first, or when a repeated centroid has moved off its twin."""
        if self._centroids.shape != task.centroids.shape:
            return True
        return bool(np.any(np.isinf(self._bias) & ~np.isinf(task.bias)))

    def _update(self, task: "_Task") -> None:
        """Scores what was near again, and whatever may have come near since."""
        task.scores = np.empty(self._near.shape, np.float32)
        small = task.small
        each_tile(
            len(task.rows),
            TILE_ROWS,
            lambda a, b: _rescore(a, b, task.rows, task.centroids, small, self._near, task.scores),
        )
        room = task.scores.max(axis=1) - self._rest - np.float32(task.slack(fast_dtype()))
        all_again = np.zeros(len(room), bool)
        for epoch, reference in self._reference.items():
            mine = np.flatnonzero(self._epoch == epoch)
            distance = task.moved(*reference)
            order = np.argsort(-distance, kind="stable")
            needed = np.searchsorted(-distance[order], -room[mine])
            limits = np.array([int(share * len(order)) for share in SHARES])
            group = np.searchsorted(limits, needed)
            spent = self._spent[mine] + COST[group]
            group[spent > 1] = len(limits)
            self._spent[mine] = spent
            all_again[mine[group == len(limits)]] = True
            for number in range(1, len(limits)):
                if (group == number).any():
                    far = np.sort(order[: limits[number]]).astype(np.int32)
                    self._try(task, mine[group == number], far)
        chosen = np.flatnonzero(all_again)
        self._calls += 1
        self._epoch[chosen], self._spent[chosen] = self._calls, 0
        self._reference[self._calls] = (task.centroids, task.bias)
        in_use = set(np.unique(self._epoch).tolist())
        self._reference = {e: kept for e, kept in self._reference.items() if e in in_use}
        self._search(task, chosen, fast_dtype())

    def _try(self, task: "_Task", chosen: Ints, far: Ids) -> None:
        """Scores the centroids `far` for some rows; those that come near are remembered."""
        products = Products(task.centroids[far], task.small[far])
        state = (task.rows, task.centroids, task.small, self._near, task.scores, self._rest)
        slack = np.float32(task.slack(fast_dtype()))

        def tile(start: int, stop: int) -> None:
            mine = chosen[start:stop]
            _offer(mine, products.scores(gathered(task.rows, mine)), far, slack, *state)

        each_tile(len(chosen), TILE_ROWS, tile)

    def _search(self, task: "_Task", chosen: Ints, dtype: torch.dtype) -> None:
        """Scores all centroids for some rows."""
        products = Products(task.centroids, task.small, dtype)
        slack = np.float32(task.slack(dtype))
        state = (task.rows, task.centroids, task.small, self._near, task.scores)

        def tile(start: int, stop: int) -> None:
            mine = chosen[start:stop]
            scores = products.scores(gathered(task.rows, mine))
            _remember(mine, scores, self._near, task.scores, self._rest)
            if dtype != torch.float32:
                _rescore_chosen(mine, *state)

        each_tile(len(chosen), TILE_ROWS, tile)
        in_doubt = chosen[task.scores[chosen].max(axis=1) < self._rest[chosen] + slack]
        if len(in_doubt) and dtype != torch.float32:
            self._search(task, in_doubt, torch.float32)
        elif len(in_doubt):
            self._settle_crowds(task, in_doubt)

    def _settle_crowds(self, task: "_Task", chosen: Ints) -> None:
        """Rows with more equally near centroids than are remembered."""
        products = Products(task.centroids, task.small, torch.float32)
        slack = np.float32(task.slack(torch.float32))

        def tile(start: int, stop: int) -> None:
            mine = chosen[start:stop]
            scores = products.scores(gathered(task.rows, mine))
            _settle_crowd(mine, scores, slack, task.rows, task.centroids, task.bias, self._near)

        each_tile(len(chosen), TILE_ROWS, tile)


@dataclass
class _Task:
    """One call: rows (n, D), centroids (k, D), bias (k,), and scores of the near ones (n, t)."""

    rows: Floats
    centroids: Floats
    bias: Doubles
    longest: float
    scores: Floats = field(default_factory=lambda: np.empty((0, 0), np.float32))

    def __post_init__(self) -> None:
        self.small: Floats = self.bias.astype(np.float32)

    def slack(self, dtype: torch.dtype) -> float:
        """Scores that differ by less may be in the wrong order."""
        return 2 * self.longest * SLACK[dtype] * _longest(self.centroids)

    def moved(self, before: Floats, bias: Doubles) -> Floats:
        """How much the score of any row can have risen for each centroid (k,)."""
        still = np.isinf(self.bias)  # a repeated one: nothing comes near it
        shift = np.abs(np.where(still, 0, self.bias) - np.where(still, 0, bias))
        moved: Floats = self.longest * np.linalg.norm(self.centroids - before, axis=1) + shift
        return moved


def _longest(rows: Floats) -> float:
    return float(np.sqrt(np.einsum("nd,nd->n", rows, rows).max(initial=0.0)))


def _bias(centroids: Floats, spherical: bool) -> Doubles:
    """What is added to the products (k,): minus infinity for a centroid that was there before."""
    wide = centroids.astype(np.float64)
    bias = np.zeros(len(wide)) if spherical else -0.5 * np.einsum("kd,kd->k", wide, wide)
    as_bytes = np.ascontiguousarray(centroids).view(f"V{4 * centroids.shape[1]}")[:, 0]
    first = np.unique(as_bytes, return_index=True)[1]
    again = np.ones(len(wide), bool)
    again[first] = False
    bias[again] = -np.inf
    return bias


@numba.njit(nogil=True, cache=True)
def _remember(chosen: Ints, scores: Floats, near: Ids, near_scores: Floats, rest: Floats) -> None:
    """Keeps the best columns of each row of `scores`, and the first that was left out as bound."""
    width = near.shape[1]
    best, at = np.empty(width + 1, np.float32), np.empty(width + 1, np.int32)
    for i in range(chosen.size):
        filled = top_of_row(scores[i], best, at)
        near[chosen[i]] = at[:width]
        near_scores[chosen[i]] = best[:width]
        rest[chosen[i]] = best[width] if filled > width else -np.inf


@numba.njit(nogil=True, cache=True)
def _rescore(
    start: int, stop: int, rows: Floats, centroids: Floats, bias: Floats, near: Ids, out: Floats
) -> None:
    for i in range(start, stop):
        for slot in range(near.shape[1]):
            j = near[i, slot]
            out[i, slot] = fast_dot(rows[i], centroids[j]) + bias[j]


@numba.njit(nogil=True, cache=True)
def _rescore_chosen(
    chosen: Ints, rows: Floats, centroids: Floats, bias: Floats, near: Ids, out: Floats
) -> None:
    for i in chosen:
        _rescore(i, i + 1, rows, centroids, bias, near, out)


@numba.njit(nogil=True, cache=True, fastmath={"nnan", "nsz", "reassoc"})
def _offer(
    chosen: Ints,
    scores: Floats,
    columns: Ids,
    slack: np.float32,
    rows: Floats,
    centroids: Floats,
    bias: Floats,
    near: Ids,
    near_scores: Floats,
    rest: Floats,
) -> None:
    """Puts columns that beat a near one of a row in its place; the bound covers what it loses."""
    for i in range(chosen.size):
        row = chosen[i]
        worst = np.argmin(near_scores[row])
        largest = scores[i, 0]
        for j in range(scores.shape[1]):
            largest = max(largest, scores[i, j])
        if largest <= near_scores[row, worst] - slack:
            continue
        for j in range(scores.shape[1]):
            if scores[i, j] <= near_scores[row, worst] - slack or _holds(near[row], columns[j]):
                continue
            column = columns[j]
            score = fast_dot(rows[row], centroids[column]) + bias[column]
            if score > near_scores[row, worst]:
                rest[row] = max(rest[row], near_scores[row, worst])
                near[row, worst], near_scores[row, worst] = column, score
                worst = np.argmin(near_scores[row])


@numba.njit(nogil=True, cache=True)
def _holds(near: Ids, column: int) -> bool:
    for slot in range(near.size):  # noqa: SIM110 (numba knows no generators)
        if near[slot] == column:
            return True
    return False


@numba.njit(nogil=True, cache=True)
def _settle(
    start: int,
    stop: int,
    rows: Floats,
    centroids: Floats,
    bias: Doubles,
    near: Ids,
    near_scores: Floats,
    slack: np.float32,
    cluster: Ints,
    score: Floats,
) -> None:
    """The nearest of the near ones, those within `slack` of the best compared in fp64."""
    for i in range(start, stop):
        floor = near_scores[i].max() - slack
        best, at = -np.inf, np.int64(-1)
        for slot in range(near.shape[1]):
            j = np.int64(near[i, slot])
            if near_scores[i, slot] >= floor:
                exact = exact_dot(rows[i], centroids[j]) + bias[j]
                if at < 0 or exact > best or (exact == best and j < at):
                    best, at = exact, j
        cluster[i], score[i] = at, best


@numba.njit(nogil=True, cache=True)
def _settle_crowd(
    chosen: Ints,
    scores: Floats,
    slack: np.float32,
    rows: Floats,
    centroids: Floats,
    bias: Doubles,
    near: Ids,
) -> None:
    """Rows with more equally near centroids than are remembered: the nearest of all goes first."""
    for i in range(chosen.size):
        row = chosen[i]
        floor = scores[i].max() - slack
        best, at = -np.inf, -1
        for j in range(scores.shape[1]):
            if scores[i, j] >= floor:
                exact = exact_dot(rows[row], centroids[j]) + bias[j]
                if at < 0 or exact > best:
                    best, at = exact, j
        if not _holds(near[row], at):
            near[row, 0] = at
