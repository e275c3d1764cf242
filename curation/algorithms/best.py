"""The k best of each row, kept as heaps: what blocks of scores are offered to.

Better is a larger score, of equal scores the smaller number. That order is total, so the result
doesn't depend on the order in which scores come.
"""

from dataclasses import dataclass

import numba
import numpy as np

from curation.algorithms.products import NONE, Floats, Ints, precedes
from curation.algorithms.tiles import each_tile

TILE_ROWS = 4096


@dataclass
class Neighbours:
    """For each of n rows up to k others: scores (n, k), falling, and numbers (n, k), NONE last."""

    score: Floats
    number: Ints


class Best:
    """The k best above `floor` of each of `count` rows; the worst of them stands first."""

    def __init__(self, count: int, k: int, floor: float = -np.inf) -> None:
        self.score = np.full((count, k), floor, np.float32)
        self.number = np.full((count, k), NONE)  # below every number: only a better score gets in

    def sorted(self) -> Neighbours:
        """Best first. The heaps are used up."""
        heaps = self.score, self.number
        each_tile(len(self.score), TILE_ROWS, lambda start, stop: _sort(start, stop, *heaps))
        return Neighbours(self.score, self.number)


@numba.njit(nogil=True, cache=True)
def offer(score: Floats, number: Ints, new_score: np.float32, new_number: int, again: bool) -> None:
    """Offers one pair to a heap (k,); `again`: the heap may hold that number already."""
    if not precedes(new_score, new_number, score[0], number[0]):
        return
    if again:
        for slot in range(number.size):
            if number[slot] == new_number:
                return
    _sift(score, number, score.size, new_score, new_number)


@numba.njit(nogil=True, cache=True)
def _sift(score: Floats, number: Ints, size: int, new_score: np.float32, new_number: int) -> None:
    """Puts a pair in the place of the worst of the first `size`."""
    place = 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and precedes(
            score[child], number[child], score[child + 1], number[child + 1]
        ):
            child += 1
        if precedes(score[child], number[child], new_score, new_number):
            break
        score[place], number[place] = score[child], number[child]
        place = child
    score[place], number[place] = new_score, new_number


@numba.njit(nogil=True, cache=True)
def _sort(start: int, stop: int, scores: Floats, numbers: Ints) -> None:
    """Of rows start .. stop: what stands first, the worst, goes last."""
    for i in range(start, stop):
        score, number = scores[i], numbers[i]
        for last in range(score.size - 1, 0, -1):
            worst, its_number = score[0], number[0]
            _sift(score, number, last, score[last], number[last])
            score[last], number[last] = worst, its_number
        for slot in range(score.size):
            if number[slot] == NONE:
                score[slot] = -np.inf
