"""The rows nearest to each centroid, of rows that need not fit in memory: where to draw the line.

What is asked is a limit for each cluster, below which lie as many rows as are wanted. It is found
digit by digit from counts (radix selection): memory depends on the number of clusters alone.
"""

from collections.abc import Callable, Iterable

import numba
import numpy as np
import numpy.typing as npt

from curation.algorithms.products import Floats, Ids, Ints

PLACE_BITS = 36  # of a row among all: 69 billion rows
COSINE_BITS = 24  # after the point: fp32 is no finer from cosine .5 upwards
FARTHEST = 1.25  # above any cosine of rows whose norms are rounded; 2.25 fits the 27 bits left
DIGIT_BITS = 8
KEY_BITS = 64  # the first of them is never set
NONE_FARTHER = np.iinfo(np.int64).max

Keyed = Callable[[], Iterable[tuple[Ids, Ints]]]


def keys(cosine: Floats, start: int) -> Ints:
    """One number (n,) a row that orders it: by falling cosine (n,), of equal ones the first.

    `start` is the place of the first row among all. Cosines are told apart by 2^-24: all of those
    above a half, and below it nearly all.
    """
    scaled = (FARTHEST - cosine.astype(np.float64)) * 2.0**COSINE_BITS
    place = np.arange(start, start + len(cosine), dtype=np.int64)
    return (np.rint(scaled).astype(np.int64) << PLACE_BITS) | place


def limits(blocks: Keyed, k: int, wanted: int) -> Ints:
    """The limit (k,) of each cluster: `wanted` of its rows have a key up to it, or all there are.

    `blocks` gives the clusters (n_i,) and `keys` (n_i,) of all rows, the same at every call: four
    passes over them, and up to four more where equal cosines lie at a limit. Memory: 2.5 KB a
    cluster.
    """
    found, missing = np.zeros(k, np.int64), np.full(k, wanted, np.int64)
    searching = np.ones(k, np.bool_)
    for shift in range(KEY_BITS - DIGIT_BITS, -1, -DIGIT_BITS):
        counts = np.zeros((k, 1 << DIGIT_BITS), np.int64)
        for cluster, key in blocks():
            _count(cluster, key, found >> shift >> DIGIT_BITS, searching, shift, counts)
        upto = np.cumsum(counts, axis=1, out=counts)
        few = searching & (upto[:, -1] <= missing)
        found[few], searching[few] = NONE_FARTHER, False
        mine = np.flatnonzero(searching)
        digit = (upto < missing[:, None]).sum(axis=1)[mine]
        before = np.where(digit > 0, upto[mine, digit - 1], 0)
        whole = upto[mine, digit] == missing[mine]  # all rows with these digits
        found[mine] |= digit << shift
        missing[mine] -= before
        found[mine[whole]] |= (1 << shift) - 1
        searching[mine[whole]] = False
        if not searching.any():
            break
    return found


@numba.njit(nogil=True, cache=True)
def _count(
    cluster: Ids,
    key: Ints,
    above: Ints,
    searching: npt.NDArray[np.bool_],
    shift: int,
    counts: Ints,
) -> None:
    """The digit at `shift` of the keys whose higher digits are those of their cluster's limit."""
    for i in range(key.size):
        c = cluster[i]
        if searching[c]:
            digits = key[i] >> shift
            if digits >> DIGIT_BITS == above[c]:
                counts[c, digits & ((1 << DIGIT_BITS) - 1)] += 1
