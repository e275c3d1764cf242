"""Crowds: rows that are all but equal by the thousand, of which one stands for all.

A placeholder that was saved a million times gives a million rows, each of which has all others as
neighbours. To compare them is quadratic and tells nothing, since any of them joins a row to all.
"""

import numba
import numpy as np
import numpy.typing as npt

from curation.algorithms.products import Floats, Ints, fast_dot
from curation.algorithms.tiles import each

ALIKE = 0.99  # rows of a larger product are one picture to every descriptor in use
CROWD = 1024  # so many others: a few are no burden
LEADERS = 16  # rows of a cell that are tried as the one that stands for others
GLANCE = 128  # rows of a cell that a leader is compared with first: one alike calls for all

Bools = npt.NDArray[np.bool_]


def without_crowds(rows: Floats, cell: Ints, cells: int, alike: float) -> Bools:
    """Which unit rows (n, D) stay (n,), when of a crowd in one cell (n,) a single row does.

    A crowd is a row and at least CROWD others whose product with it is above `alike`.
    """
    order = np.argsort(cell, kind="stable")
    starts = np.searchsorted(cell[order], np.arange(cells + 1))
    stays = np.ones(len(rows), np.bool_)
    large = np.flatnonzero(np.diff(starts) > CROWD)

    def look(at: int) -> None:
        first, last = starts[large[at]], starts[large[at] + 1]
        _look(rows, order[first:last], CROWD, np.float32(alike), stays)

    each(len(large), look)
    return stays


@numba.njit(nogil=True, cache=True)
def _has_alike(rows: Floats, members: Ints, leader: int, alike: np.float32) -> bool:
    """Whether some evenly spaced members (m,) but the leader itself are alike to it."""
    for turn in range(GLANCE):
        member = members[turn * members.size // GLANCE]
        if member != leader and fast_dot(rows[leader], rows[member]) > alike:
            return True
    return False


@numba.njit(nogil=True, cache=True)
def _look(rows: Floats, members: Ints, least: int, alike: np.float32, stays: Bools) -> None:
    """Takes the followers of some evenly spaced members of a cell (m,) out of `stays` (n,)."""
    for turn in range(min(LEADERS, members.size)):
        leader = members[turn * members.size // LEADERS]
        if not stays[leader] or not _has_alike(rows, members, leader, alike):
            continue
        followers = [leader]
        for member in members:
            if stays[member] and fast_dot(rows[leader], rows[member]) > alike:
                followers.append(member)
        if len(followers) - 2 >= least:  # the leader is there twice
            for member in followers:
                stays[member] = member == leader
