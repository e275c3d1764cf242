"""What is known of rows and their nearest centroids between the calls of `assign.Assigner`.

Kernels over rows start .. stop, or over chosen ones: one thread each, several at once.
"""

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from curation.algorithms.products import Doubles, Floats, Ids, Ints, exact_dot, fast_dot


class Bounds(NamedTuple):
    """Of each of n rows: t near centroids, a bound for all others. 94 bytes each for t = 10."""

    near: Ids  # (n, t) numbers of centroids
    score: Floats  # (n, t) at call `looked`; at most so much, and exact where it could be the best
    slot: npt.NDArray[np.int8]  # (n,) where the nearest of all stands in `near`
    looked: npt.NDArray[np.int16]  # (n,) call
    rest: Floats  # (n,) no other centroid scored more at call `searched`
    searched: npt.NDArray[np.int16]  # (n,) call
    spent: Floats  # (n,) since then, in comparisons with all

    @classmethod
    def unknown(cls, rows: int, width: int) -> "Bounds":
        return cls(
            np.empty((rows, width), np.int32),
            np.empty((rows, width), np.float32),
            np.zeros(rows, np.int8),
            np.zeros(rows, np.int16),
            np.empty(rows, np.float32),
            np.zeros(rows, np.int16),
            np.zeros(rows, np.float32),
        )

    def nearest(self) -> Ints:
        """The nearest centroid of each row (n,)."""
        return self.near[np.arange(len(self.slot)), self.slot].astype(np.int64)


class Columns(NamedTuple):
    """Centroids (k, D) and what is added to their products (k,), in fp64 and in fp32."""

    centroids: Floats
    bias: Doubles
    small: Floats


class Moves(NamedTuple):
    """How much any score can have risen or fallen since the earlier of c calls: (c, k)."""

    place: Ints  # (calls,) of a call in what follows
    by: Floats  # (c, k)
    falling: Floats  # (c, k) the same, the largest first


class Call(NamedTuple):
    """Number of the call, and how far fp32 and fast scores can be off."""

    now: int
    slack: np.float32
    fast_slack: np.float32


@numba.njit(nogil=True, cache=True)
def look(
    start: int,
    stop: int,
    rows: Floats,
    to: Columns,
    known: Bounds,
    moves: Moves,
    call: Call,
    limits: Ints,
    group: npt.NDArray[np.uint8],
) -> None:
    """Scores again the near centroids that may be the nearest now.

    `group`: how many of the centroids that moved most may have come near, as a place in `limits`.
    """
    width = known.near.shape[1]
    for i in range(start, stop):
        since = moves.by[moves.place[known.looked[i]]]
        falling = moves.falling[moves.place[known.searched[i]]]
        own = known.near[i, known.slot[i]]
        least = known.score[i, known.slot[i]] - since[own]
        if to.small[own] == -np.inf:
            least = np.float32(-np.inf)
        most = np.float32(-np.inf)
        for slot in range(width):
            if slot != known.slot[i]:
                most = max(most, known.score[i, slot] + since[known.near[i, slot]])
        if least - call.slack > most and least - known.rest[i] - call.fast_slack > falling[0]:
            continue
        least = fast_dot(rows[i], to.centroids[own]) + to.small[own]
        best = least
        for slot in range(width):
            j = known.near[i, slot]
            bound = known.score[i, slot] + since[j]
            if j == own:
                bound = least
            elif bound >= least - call.slack:
                bound = fast_dot(rows[i], to.centroids[j]) + to.small[j]
            known.score[i, slot] = bound
            best = max(best, bound)
        known.looked[i] = call.now
        _settle_row(i, rows, to, known, call.slack)
        room = best - known.rest[i] - call.fast_slack
        while group[i] < limits.size and (
            limits[group[i]] < falling.size and falling[limits[group[i]]] >= room
        ):
            group[i] += 1


@numba.njit(nogil=True, cache=True)
def remember(
    chosen: Ints, best: Floats, at: Ids, rows: Floats, to: Columns, known: Bounds, call: Call
) -> None:
    """Keeps the best columns (n, t) of each row, and the first that is left out as bound."""
    width = known.near.shape[1]
    for row in range(chosen.size):
        i = chosen[row]
        known.rest[i] = best[row, width] if best.shape[1] > width else -np.inf
        for slot in range(width):
            j = at[row, slot]
            known.near[i, slot] = j
            known.score[i, slot] = best[row, slot]
            if call.fast_slack > call.slack:  # the products were rounded
                known.score[i, slot] = fast_dot(rows[i], to.centroids[j]) + to.small[j]
        known.looked[i], known.searched[i], known.spent[i] = call.now, call.now, 0
        _settle_row(i, rows, to, known, call.slack)


@numba.njit(nogil=True, cache=True)
def floors(chosen: Ints, known: Bounds, call: Call) -> Floats:
    """What fast scores of chosen rows (n,) must reach to beat a near one (n,)."""
    out = np.empty(chosen.size, np.float32)
    for row in range(chosen.size):
        out[row] = known.score[chosen[row]].min() - call.fast_slack
    return out


@numba.njit(nogil=True, cache=True)
def offer(
    chosen: Ints,
    at_row: Ids,
    at_column: Ids,
    columns: Ids,
    moved: Floats,
    rows: Floats,
    to: Columns,
    known: Bounds,
    call: Call,
) -> None:
    """Puts columns that beat a near one of a row in its place; the bound covers what it loses.

    Offered are pairs (p,) of a row of `chosen` and one of `columns`, in order of rows. `moved`
    (k,): how far each centroid is from where it was when all were compared. It may go back, and
    what is left out now scores as much more then.
    """
    for pair in range(at_row.size):
        i, j = chosen[at_row[pair]], columns[at_column[pair]]
        if not _holds(known.near[i], j):
            score = fast_dot(rows[i], to.centroids[j]) + to.small[j]
            worst = np.argmin(known.score[i])
            if score > known.score[i, worst]:
                left_out = known.score[i, worst] + moved[known.near[i, worst]]
                known.rest[i] = max(known.rest[i], left_out)
                known.near[i, worst], known.score[i, worst] = j, score
        if pair + 1 == at_row.size or at_row[pair + 1] != at_row[pair]:
            _settle_row(i, rows, to, known, call.slack)


@numba.njit(nogil=True, cache=True)
def settle_crowd(
    chosen: Ints, scores: Floats, rows: Floats, to: Columns, known: Bounds, call: Call
) -> None:
    """Rows with more equally near centroids than are remembered: the nearest of all goes first."""
    for row in range(chosen.size):
        i = chosen[row]
        floor = scores[row].max() - call.slack
        best, at = -np.inf, -1
        for j in range(scores.shape[1]):
            if scores[row, j] >= floor:
                exact = exact_dot(rows[i], to.centroids[j]) + to.bias[j]
                if at < 0 or exact > best:
                    best, at = exact, j
        if not _holds(known.near[i], at):
            known.near[i, 0] = at
            known.score[i, 0] = best
        for slot in range(known.near.shape[1]):
            if known.near[i, slot] == at:
                known.slot[i] = slot


@numba.njit(nogil=True, cache=True)
def _settle_row(i: int, rows: Floats, to: Columns, known: Bounds, slack: np.float32) -> None:
    """The nearest of the near ones, those within `slack` of the best compared in fp64."""
    floor = known.score[i].max() - slack
    some = 0
    for slot in range(known.near.shape[1]):
        if known.score[i, slot] >= floor:
            known.slot[i] = slot
            some += 1
    if some == 1:
        return
    best, at = -np.inf, np.int32(-1)
    for slot in range(known.near.shape[1]):
        j = known.near[i, slot]
        if known.score[i, slot] >= floor:
            exact = exact_dot(rows[i], to.centroids[j]) + to.bias[j]
            if at < 0 or exact > best or (exact == best and j < at):
                best, at = exact, j
                known.slot[i] = slot


@numba.njit(nogil=True, cache=True)
def _holds(near: Ids, column: int) -> bool:
    for slot in range(near.size):  # noqa: SIM110 (numba knows no generators)
        if near[slot] == column:
            return True
    return False
