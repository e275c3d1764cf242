"""The k best of each row, kept as heaps: what blocks of scores are offered to.

Better is a larger score, of equal scores the smaller number. That order is total, so the result
doesn't depend on the order in which scores come.
"""

from dataclasses import dataclass

import numba
import numpy as np

from curation.algorithms.products import Floats, Ints

NONE = -1  # the number of a neighbour that isn't there


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
        _sort(self.score, self.number)
        self.score[self.number == NONE] = -np.inf
        return Neighbours(self.score, self.number)


@numba.njit(nogil=True, cache=True)
def offer(score: Floats, number: Ints, new_score: np.float32, new_number: int, again: bool) -> None:
    """Offers one pair to a heap (k,); `again`: the heap may hold that number already."""
    if not _better(new_score, new_number, score[0], number[0]):
        return
    if again:
        for slot in range(number.size):
            if number[slot] == new_number:
                return
    place, size = 0, score.size
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and _better(
            score[child], number[child], score[child + 1], number[child + 1]
        ):
            child += 1
        if _better(score[child], number[child], new_score, new_number):
            break
        score[place], number[place] = score[child], number[child]
        place = child
    score[place], number[place] = new_score, new_number


@numba.njit(nogil=True, cache=True)
def _better(score: np.float32, number: int, other_score: np.float32, other_number: int) -> bool:
    return bool(score > other_score or (score == other_score and number < other_number))


@numba.njit(nogil=True, cache=True)
def _sort(scores: Floats, numbers: Ints) -> None:
    for i in range(scores.shape[0]):
        score, number = scores[i], numbers[i]
        by_number = np.argsort(number)
        order = by_number[np.argsort(-score[by_number], kind="mergesort")]
        scores[i], numbers[i] = score[order], number[order]
