"""Looks through blocks of scores: for the largest of each row, or for those that reach a floor.

What is looked at are keys: the bits of fp32 or bf16 scores as whole numbers, the negative ones
turned round, which compare as the scores do. Of bf16 one instruction compares 32, and no copy in
fp32 is needed.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import torch

Keys = npt.NDArray[np.signedinteger[Any]]  # of 16 or 32 bits
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]

# Scores whose largest is looked at before any of them, in short rows and in long ones.
CHUNKS = 32, 128
LONG = 1024
# Rows are folded to so many lanes, each the largest of every LANES-th score, if few are asked for.
LANES, FEW = 128, 32
MANY = 16  # columns that few rows have near to them: what so many reach, or score enough to follow
COLUMN_BITS = 32
COLUMN_MASK = (1 << COLUMN_BITS) - 1

NONE = -1  # the number of what isn't there

BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def keys(scores: torch.Tensor) -> Keys:
    """Makes keys (n, m) of fp32 or bf16 scores (n, m), in their place."""
    bits: Keys = scores.view(BITS[scores.dtype]).numpy()
    sign: Any = bits.dtype.type(8 * bits.itemsize - 1)
    _turn(bits, sign, _largest(bits.dtype))
    return bits


def scores_of(found: Keys) -> Floats:
    """The scores that keys stand for."""
    bits = found ^ ((found >> (8 * found.itemsize - 1)) & _largest(found.dtype))
    scores: Floats = (bits.astype(np.int32) << 16 if bits.itemsize == 2 else bits).view(np.float32)
    return scores


def floors_of(scores: Floats, dtype: npt.DTypeLike) -> Keys:
    """The largest keys that no score below those (n,) reaches; zero counts as its negative."""
    bits = np.where(scores == 0, np.float32(-0.0), scores).view(np.int32)
    floors: Keys = bits ^ ((bits >> 31) & _largest(np.dtype(np.int32)))
    return floors if dtype == np.int32 else (floors >> 16).astype(np.int16)


def top(found: Keys, columns: int, count: int) -> tuple[Keys, Ids]:
    """The `count` largest of the first `columns` of each row, falling, and where they are: (n, t).

    Equal ones keep the order of their columns.
    """
    best = np.empty((len(found), count), found.dtype)
    at = np.empty((len(found), count), np.int32)
    _top(found, columns, _lanes(columns, count), best, at)
    return best, at


class Within(NamedTuple):
    """The columns that are near to a row: its `least` best, and as many more as score at least
    `share` of the best score, the i-th less margins[i] (most,), which don't rise."""

    share: float
    margins: Floats
    least: int


def near(found: Keys, columns: int, unit: Floats, within: Within) -> Ids:
    """The columns (n, most), of the first `columns`, that score as `within` asks, the best first;
    NONE after them. Scores are whole numbers of a `unit` (n,)."""
    at = np.empty((len(found), len(within.margins)), np.int32)
    lanes = np.empty(_lanes(columns, max(within.least, MANY)), found.dtype)
    _near(found, columns, unit, within, lanes, at)
    return at


def floors_of_top(found: Keys, columns: int, count: int) -> Keys:
    """Floors (n,) that at least `count` of the first `columns` of each row reach, and few more."""
    floors = np.empty(len(found), found.dtype)
    _floors_of_top(found, columns, _lanes(columns, count), count, floors)
    return floors


def reaching(
    found: Keys, columns: int, floors: Keys, others: Keys, at_row: Ids, at_column: Ids
) -> int:
    """Writes down which of the first `columns` of each row reach a floor; returns how many do.

    `floors` (n,) are of the rows, `others` (columns,) of the columns, or empty.
    """
    state = found, columns, _chunk(columns), floors, others, _least(found.dtype)
    count: int = _reaching(*state, at_row, at_column)
    return count


def _chunk(columns: int) -> int:
    return CHUNKS[columns > LONG]


def _lanes(columns: int, count: int) -> int:
    return LANES if count <= FEW and columns > 2 * LANES else columns


def _largest(dtype: np.dtype[Any]) -> Any:
    return dtype.type(np.iinfo(dtype).max)


def _least(dtype: np.dtype[Any]) -> Any:
    return dtype.type(np.iinfo(dtype).min)


@numba.njit(nogil=True, cache=True)
def _turn(bits: Keys, sign: int, turned: int) -> None:
    for i in range(bits.shape[0]):
        for j in range(bits.shape[1]):
            bits[i, j] ^= (bits[i, j] >> sign) & turned


@numba.njit(nogil=True, cache=True)
def _peaks(row: Keys, columns: int, chunk: int, least: int, peaks: Keys) -> None:
    """The largest of each whole chunk (c,), and in one more place of the last columns."""
    for c in range(columns // chunk):
        peaks[c] = _peak(row[c * chunk : (c + 1) * chunk], least)
    peaks[columns // chunk] = _peak(row[max(0, columns - chunk) : columns], least)


@numba.njit(nogil=True, cache=True)
def _peak(some: Keys, least: int) -> int:
    peak = least
    for j in range(some.size):
        peak = max(peak, some[j])
    return peak


@numba.njit(nogil=True, cache=True)
def _fold(row: Keys, columns: int, lanes: Keys) -> None:
    """The largest of the columns l, l + m, l + 2 m ... in each of m lanes."""
    width = lanes.size
    lanes[:] = row[:width]
    for start in range(width, columns, width):
        part = row[start : min(start + width, columns)]
        for lane in range(part.size):
            lanes[lane] = max(lanes[lane], part[lane])


@numba.njit(nogil=True, cache=True)
def _least_of(some: Keys) -> Any:
    least = some[0]
    for j in range(some.size):
        least = min(least, some[j])
    return least


@numba.njit(nogil=True, cache=True)
def _reach(some: Keys, floor: Any) -> Any:
    """How many reach a floor."""
    count = np.int32(0)
    for j in range(some.size):
        count += np.int32(some[j] >= floor)
    return count


@numba.njit(nogil=True, cache=True)
def _least_of_top(some: Keys, count: int) -> Any:
    """The largest key that `count` of some reach, by bisection: comparing all is cheap."""
    low, high = np.int64(_least_of(some)), np.int64(_peak(some, some[0]))
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        if _reach(some, middle) >= count:
            low = middle
        else:
            high = middle - 1
    return low


@numba.njit(nogil=True, cache=True)
def _rank(some: Ints, best: Keys, at: Ids) -> None:
    """Puts the largest in order; each of `some` is a key and, below it, NOT the column."""
    for one in some:
        place = np.int64(0)
        for j in range(some.size):
            place += some[j] > one
        if place < best.size:
            best[place], at[place] = one >> COLUMN_BITS, ~one & COLUMN_MASK


@numba.njit(nogil=True, cache=True)
def _top(found: Keys, columns: int, width: int, best: Keys, at: Ids) -> None:
    lanes, reached = np.empty(width, found.dtype), np.empty(width + 1, np.int32)
    some = np.empty(columns + 1, np.int64)
    for i in range(found.shape[0]):
        row, lane_count, count = found[i], 0, 0
        _fold(row, columns, lanes)
        floor = _least_of_top(lanes, best.shape[1])
        for lane in range(width):  # without a branch: half of them would be guessed wrong
            reached[lane_count] = lane
            lane_count += lanes[lane] >= floor
        for lane in reached[:lane_count]:
            for column in range(lane, columns, width):
                some[count] = (np.int64(row[column]) << COLUMN_BITS) | (~column & COLUMN_MASK)
                count += row[column] >= floor
        _rank(some[:count], best[i], at[i])


@numba.njit(nogil=True, cache=True)
def _near(found: Keys, columns: int, unit: Floats, within: Within, lanes: Keys, at: Ids) -> None:
    share, margins, width = np.float32(within.share), within.margins, lanes.size
    best = np.empty(margins.size, found.dtype)
    least = min(within.least, columns, margins.size)
    many = min(max(least, MANY), columns, margins.size)
    for i in range(found.shape[0]):
        row, filled = found[i], 0
        _fold(row, columns, lanes)
        share_of_best = share * (np.float32(_peak(lanes, lanes[0])) * unit[i])
        # Those of the `least` reach the first bound, all others either.
        floor = min(
            _at_least(share_of_best - margins[least - 1], unit[i]), _least_of_top(lanes, least)
        )
        if many > least:
            second = _at_least(share_of_best - margins[many - 1], unit[i])
            floor = max(floor, min(second, _least_of_top(lanes, many)))
        for lane in range(width):
            if lanes[lane] < floor:
                continue
            for column in range(lane, columns, width):
                key, place = row[column], filled
                if key < floor:
                    continue
                while place > 0 and not _first(best, at[i], place, key, column):
                    place -= 1
                if place >= least and (
                    place == best.size or np.float32(key) * unit[i] < share_of_best - margins[place]
                ):
                    continue
                for later in range(min(filled, best.size - 1), place, -1):
                    best[later], at[i, later] = best[later - 1], at[i, later - 1]
                best[place], at[i, place] = key, column
                filled = min(filled + 1, best.size)
        while filled > least and (
            np.float32(best[filled - 1]) * unit[i] < share_of_best - margins[filled - 1]
        ):
            filled -= 1
        at[i, filled:] = NONE


@numba.njit(nogil=True, cache=True)
def _at_least(score: np.float32, unit: np.float32) -> Any:
    """The least whole number of units that reaches a score."""
    return np.int64(np.ceil(score / unit))


@numba.njit(nogil=True, cache=True)
def _first(best: Keys, at: Ids, filled: int, key: int, column: int) -> bool:
    """Whether the last of those filled in goes before a column of some key."""
    last = best[filled - 1]
    return bool(last > key or (last == key and at[filled - 1] < column))


@numba.njit(nogil=True, cache=True)
def _floors_of_top(found: Keys, columns: int, width: int, count: int, floors: Keys) -> None:
    lanes = np.empty(width, found.dtype)
    for i in range(found.shape[0]):
        _fold(found[i], columns, lanes)
        floors[i] = _least_of_top(lanes, count)


@numba.njit(nogil=True, cache=True)
def _reaching(
    found: Keys,
    columns: int,
    chunk: int,
    floors: Keys,
    others: Keys,
    least: int,
    at_row: Ids,
    at_column: Ids,
) -> int:
    count, chunks = 0, columns // chunk
    peaks = np.empty(chunks + 1, found.dtype)
    lowest = others[0] if others.size else floors[0]
    for j in range(others.size):
        lowest = min(lowest, others[j])
    for i in range(found.shape[0]):
        row, floor = found[i], floors[i]
        either = min(floor, lowest) if others.size else floor
        _peaks(row, columns, chunk, least, peaks)
        for c in range(chunks + 1):
            if peaks[c] < either:
                continue
            for j in range(c * chunk, min((c + 1) * chunk, columns)):
                if row[j] >= either and (row[j] >= floor or row[j] >= others[j]):
                    at_row[count], at_column[count] = i, j
                    count += 1
    return count
