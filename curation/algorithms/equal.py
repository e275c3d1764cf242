"""Rows that are equal to the bit."""

import numba
import numpy as np
import numpy.typing as npt

from curation.algorithms.products import Floats, Ints
from curation.algorithms.tiles import each_tile

TILE_ROWS = 8192
CHUNK_ROWS = 262_144

Hashes = npt.NDArray[np.uint64]
Words = npt.NDArray[np.uint32]


def first_of_equal(rows: Floats) -> Ints:
    """For each row (n, D) the position of the first that is equal to it (n,)."""
    words = np.ascontiguousarray(rows, np.float32).view(np.uint32)
    hashes = np.empty(len(rows), np.uint64)
    each_tile(len(rows), TILE_ROWS, lambda start, stop: _hash(start, stop, words, hashes))
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    firsts: Ints = first[inverse]
    again = np.flatnonzero(firsts != np.arange(len(rows)))
    for start in range(0, len(again), CHUNK_ROWS):  # equal hashes are not yet equal rows
        mine = again[start : start + CHUNK_ROWS]
        differ = (rows[mine] != rows[firsts[mine]]).any(axis=1)
        firsts[mine[differ]] = mine[differ]
    return firsts


@numba.njit(nogil=True, cache=True)
def _hash(start: int, stop: int, words: Words, out: Hashes) -> None:
    """FNV-1a over the words of rows (n, D)."""
    for i in range(start, stop):
        value = np.uint64(0xCBF29CE484222325)
        for d in range(words.shape[1]):
            value = (value ^ np.uint64(words[i, d])) * np.uint64(0x100000001B3)
        out[i] = value
