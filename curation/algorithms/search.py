"""Exact search inside cells: each is read once and answered for all queries that ask in it."""

import threading
from dataclasses import dataclass

import numba
import numpy as np

from curation.algorithms import gpu, gpu_search
from curation.algorithms.best import Best, offer
from curation.algorithms.coarse import Coarse, Scores
from curation.algorithms.products import Floats, Ints, fast_dot
from curation.algorithms.scans import FEW
from curation.algorithms.tiles import each
from curation.algorithms.visits import Base, Rows, Twins, Visits

QUERY_ROWS = 4096
BASE_ROWS = 2048


def search(
    queries: Rows, visits: Visits, base: Base, best: Best, twins: Twins | None = None
) -> None:
    """Offers to the best (n) of each query what it meets in the cells that it visits.

    With `twins` the queries are a part of the base: no row meets itself, and each pair is offered
    to both of its rows, so that it is enough if one of them visits the other.
    """
    if gpu.device() and gpu_search.has_room(queries, base, best):
        gpu_search.search(queries, visits, base, best, twins)
        return
    meeting = _Meeting(queries, base, best, twins, threading.Lock())
    asked, held = queries.coarse, base.rows.coarse

    def cell(number: int) -> None:
        asking = visits.queries[visits.starts[number] : visits.starts[number + 1]]
        for start in range(base.starts[number], base.starts[number + 1], BASE_ROWS):
            members = base.members[start : min(start + BASE_ROWS, base.starts[number + 1])]
            met = held.chosen(members, "base")
            for first in range(0, len(asking), QUERY_ROWS):
                mine = asking[first : first + QUERY_ROWS]
                meeting.of(mine, asked.chosen(mine, "queries"), members, met)

    occupied = (np.diff(base.starts) > 0) & (np.diff(visits.starts) > 0)
    work = np.flatnonzero(occupied)
    each(len(work), lambda i: cell(int(work[i])))


@dataclass(frozen=True)
class _Meeting:
    queries: Rows
    base: Base
    best: Best
    twins: Twins | None
    lock: threading.Lock

    def of(self, mine: Ints, asking: Coarse, members: Ints, met: Coarse) -> None:
        """Rows at positions `mine` (n,) meet the base's rows at `members` (m,)."""
        scores, twins = Scores(asking, met), self.twins
        # Other threads may raise the floors meanwhile: then a few are offered in vain.
        floors = self.best.score[mine, 0] - scores.off
        enough = self.best.score.shape[1] + (twins is not None)  # and itself
        if enough <= min(FEW, len(members)):  # what can't be among so many best of its row
            floors = np.maximum(floors, scores.top(enough) - 2 * scores.off)
        others = twins.best.score[twins.at[members], 0] - met.off(asking) if twins else None
        at_row, at_column = scores.reaching(floors, others)
        if not len(at_row):
            return
        row, column, found = mine[at_row], members[at_column], np.empty(len(at_row), np.float32)
        _rescore(self.queries.vectors, self.base.rows.vectors, row, column, found)
        number = self.base.rows.numbers[column]
        with self.lock:
            if twins is None:
                _offer_pairs(row, number, found, self.best.score, self.best.number, False)
                return
            own, twin = self.queries.numbers[row], twins.at[column]
            apart = own != number
            pairs = row[apart], number[apart], found[apart]
            _offer_pairs(*pairs, self.best.score, self.best.number, True)
            pairs = twin[apart], own[apart], found[apart]
            _offer_pairs(*pairs, twins.best.score, twins.best.number, True)


@numba.njit(nogil=True, cache=True)
def _rescore(left: Floats, right: Floats, at_row: Ints, at_column: Ints, out: Floats) -> None:
    """One pair by one: the same bits however rows stand together in blocks."""
    for i in range(out.size):
        out[i] = fast_dot(left[at_row[i]], right[at_column[i]])


@numba.njit(nogil=True, cache=True)
def _offer_pairs(
    rows: Ints, others: Ints, found: Floats, score: Floats, number: Ints, again: bool
) -> None:
    for i in range(found.size):
        offer(score[rows[i]], number[rows[i]], found[i], others[i], again)
