"""Looks through blocks of scores: for the largest of each row, or for those that reach a floor.

What is looked at are keys: the bits of fp32 or bf16 scores as whole numbers, the negative ones
turned round, which compare as the scores do. Of bf16 one instruction compares 32, and no copy in
fp32 is needed.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

Keys = npt.NDArray[np.signedinteger[Any]]  # of 16 or 32 bits
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int32]

# Scores whose largest is looked at before any of them, in short rows and in long ones.
CHUNKS = 32, 128
LONG = 1024
INSERTED = 128  # up to so many of the largest are found by insertion

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
    _top(found, columns, _chunk(columns), _least(found.dtype), best, at)
    return best, at


def floors_of_top(found: Keys, columns: int, count: int) -> Keys:
    """Floors (n,) that at least `count` of the first `columns` of each row reach, and few more."""
    if count > INSERTED:
        rising = np.partition(found[:, :columns], columns - count, axis=1)
        return rising[:, columns - count]
    floors = np.empty(len(found), found.dtype)
    _floors_of_top(found, columns, _chunk(columns), count, _least(found.dtype), floors)
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
def _keep(row: Keys, start: int, stop: int, above: int, best: Keys, at: Ids, filled: int) -> int:
    """Puts what of row[start:stop] is above `above` among the best so far; returns their number."""
    last = best.size - 1
    for j in range(start, stop):
        key = row[j]
        if key <= above or (filled > last and key <= best[last]):
            continue
        place = min(filled, last)
        while place > 0 and best[place - 1] < key:
            best[place], at[place] = best[place - 1], at[place - 1]
            place -= 1
        best[place], at[place] = key, j
        filled = min(filled + 1, best.size)
    return filled


@numba.njit(nogil=True, cache=True)
def _top(found: Keys, columns: int, chunk: int, least: int, best: Keys, at: Ids) -> None:
    last, chunks = best.shape[1] - 1, columns // chunk
    peaks = np.empty(chunks + 1, found.dtype)
    for i in range(found.shape[0]):
        row, above, filled = found[i], least, 0
        if chunks > last:  # so many scores are not below the last of the peaks
            _peaks(row, columns, chunk, least, peaks)
            _keep(peaks, 0, chunks, least, best[i], at[i], 0)
            above = best[i, last] - 1
        for c in range(chunks):
            if chunks <= last or peaks[c] > above:
                stop = (c + 1) * chunk
                filled = _keep(row, c * chunk, stop, above, best[i], at[i], filled)
        _keep(row, chunks * chunk, columns, above, best[i], at[i], filled)


@numba.njit(nogil=True, cache=True)
def _floors_of_top(
    found: Keys, columns: int, chunk: int, count: int, least: int, floors: Keys
) -> None:
    chunks = columns // chunk
    peaks, best = np.empty(chunks + 1, found.dtype), np.empty(count, found.dtype)
    at = np.empty(count, np.int32)
    for i in range(found.shape[0]):
        if chunks < count:
            _keep(found[i], 0, columns, least, best, at, 0)
        else:
            _peaks(found[i], columns, chunk, least, peaks)
            _keep(peaks, 0, chunks, least, best, at, 0)
        floors[i] = best[count - 1]


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
