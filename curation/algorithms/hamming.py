"""64-bit hashes that differ in few bits: all pairs of them, and which of a group stay.

Cut into m bands, two hashes at most b bits apart agree in at least m - b of them. For every choice
of m - b bands the hashes are sorted by these, and those that agree there are compared (Manku, Jain,
Das Sarma, WWW 2007).
"""

import itertools
import math
from collections.abc import Iterator
from functools import partial

import numba
import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]

HASH_BITS = 64
MOST_BANDS = 24
SORTED = 12  # pairs that are compared in the time in which a hash is sorted once
BLOCK_PAIRS = 1 << 16


@numba.njit(nogil=True, cache=True)
def _distance(a: np.uint64, b: np.uint64) -> np.int64:
    """Bits that differ, added up in pairs, nibbles and bytes."""
    x = a ^ b
    x -= (x >> np.uint64(1)) & np.uint64(0x5555555555555555)
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


def comparisons(hashes: int, bits: int) -> float:
    """The work that `near_pairs` has with each of so many hashes, as comparisons of two."""
    return _cost(hashes, bits, band_count(hashes, bits)) if bits else 0.0


def band_count(hashes: int, bits: int) -> int:
    """Into how many bands so many hashes are cut: few sorts against few comparisons."""
    return min(range(bits + 1, MOST_BANDS + 1), key=partial(_cost, hashes, bits))


def _cost(hashes: int, bits: int, bands: int) -> float:
    agreeing = HASH_BITS * (bands - bits) / bands
    cost: float = math.comb(bands, bits) * (SORTED + hashes * 0.5 ** (agreeing + 1))
    return cost


def near_pairs(hashes: Hashes, bits: int) -> Iterator[tuple[Ints, Ints]]:
    """Positions of all pairs that are at most `bits` (0 to 16) apart, of rising hashes (n,).

    They come in blocks, some pairs several times. Memory: 8 bytes a hash.
    """
    if not bits:
        return  # rising hashes are different ones
    bands = band_count(len(hashes), bits)
    edges = np.linspace(0, HASH_BITS, bands + 1).round().astype(np.uint64)
    left, right = np.empty(BLOCK_PAIRS, np.uint64), np.empty(BLOCK_PAIRS, np.uint64)
    keys = np.empty_like(hashes)
    for chosen in itertools.combinations(range(bands), bands - bits):
        order = np.array([*chosen, *sorted(set(range(bands)) - set(chosen))])
        low, width = edges[:-1][order], np.diff(edges)[order]
        _arrange(hashes, low, width, keys)
        keys.sort()
        rest = width[bands - bits :].sum()
        i, j = 0, 1
        while i < len(keys):
            found, i, j = _near(keys, rest, bits, i, j, left, right)
            pairs = np.empty((2, found), np.uint64)
            _restore(left[:found], low, width, pairs[0])
            _restore(right[:found], low, width, pairs[1])
            first, second = np.searchsorted(hashes, pairs)
            yield first, second


@numba.njit(nogil=True, cache=True)
def _arrange(hashes: Hashes, low: Hashes, width: Hashes, keys: Hashes) -> None:
    """The bands in another order, the first of it most significant."""
    one = np.uint64(1)
    for i in range(hashes.size):
        key = np.uint64(0)
        for band in range(low.size):
            mask = (one << width[band]) - one
            key = (key << width[band]) | ((hashes[i] >> low[band]) & mask)
        keys[i] = key


@numba.njit(nogil=True, cache=True)
def _restore(keys: Hashes, low: Hashes, width: Hashes, hashes: Hashes) -> None:
    """What `_arrange` was given."""
    one = np.uint64(1)
    for i in range(keys.size):
        key, whole = keys[i], np.uint64(0)
        for band in range(low.size - 1, -1, -1):
            mask = (one << width[band]) - one
            whole |= (key & mask) << low[band]
            key >>= width[band]
        hashes[i] = whole


@numba.njit(nogil=True, cache=True)
def _near(
    keys: Hashes, rest: np.uint64, bits: int, i: int, j: int, left: Hashes, right: Hashes
) -> tuple[int, int, int]:
    """Pairs that agree above the `rest` bits, from (i, j) on; goes on there when they are full."""
    found = 0
    while i < keys.size:
        while j < keys.size and keys[j] >> rest == keys[i] >> rest:
            if _distance(keys[i], keys[j]) <= bits:
                if found == left.size:
                    return found, i, j
                left[found], right[found] = keys[i], keys[j]
                found += 1
            j += 1
        i += 1
        j = i + 1
    return found, i, j


def stays_for(hashes: Hashes, groups: Ints, bits: int) -> tuple[Ints, Ints]:
    """Which row (n,) stays for each, itself or one at most `bits` away, and how far (n,) it is.

    Rows come group by group, the best of a group first: a row stays unless a better one of its
    group that stays is near, and then goes for the nearest of those, the better one when equal.
    """
    stays, distance = np.arange(len(hashes)), np.zeros(len(hashes), np.int64)
    _settle(hashes, groups, bits, stays, distance)
    return stays, distance


@numba.njit(nogil=True, cache=True)
def _settle(hashes: Hashes, groups: Ints, bits: int, stays: Ints, distance: Ints) -> None:
    held = np.empty(hashes.size, np.int64)
    count = 0
    for i in range(hashes.size):
        if i == 0 or groups[i] != groups[i - 1]:
            count = 0
        best = bits + 1
        for k in range(count):
            apart = _distance(hashes[i], hashes[held[k]])
            if apart < best:
                best, stays[i] = int(apart), held[k]
        if best > bits:
            held[count] = i
            count += 1
        else:
            distance[i] = best
