"""Exact search inside cells: each is read once and answered for all queries that ask in it."""

import threading
from dataclasses import dataclass

import numba
import numpy as np

from curation.algorithms.best import Best, offer
from curation.algorithms.products import Floats, Ids, Ints, Products, each, fast_dot, gathered

QUERY_ROWS = 512
BASE_ROWS = 2048

_NOTHING = np.empty(0, np.float32)


@dataclass(frozen=True)
class Base:
    """Rows (m, D) in order of cells, their numbers (m,), and where each cell starts (c+1,)."""

    rows: Floats
    numbers: Ints
    starts: Ints

    @classmethod
    def of(cls, rows: Floats, numbers: Ints, cell: Ints, cells: int) -> "Base":
        """Sorts rows (m, D) by their cell (m,)."""
        order = np.argsort(cell, kind="stable")
        starts = np.searchsorted(cell[order], np.arange(cells + 1))
        return cls(rows[order], numbers[order], starts)


@dataclass(frozen=True)
class Visits:
    """The positions of the queries that ask in each cell, and where each cell's start (c+1,)."""

    queries: Ints
    starts: Ints

    @classmethod
    def of(cls, cells: Ids | Ints, count: int) -> "Visits":
        """From the cells (n, p) that each query asks in, of `count`; negative: none."""
        flat = cells.ravel()
        order = np.argsort(flat, kind="stable")
        starts = np.searchsorted(flat[order], np.arange(count + 1))
        return cls(order // cells.shape[1], starts)


@dataclass(frozen=True)
class Queries:
    """Rows (n, D) and their numbers (n,)."""

    rows: Floats
    numbers: Ints


def search(
    queries: Queries, visits: Visits, base: Base, best: Best, twins: Best | None = None
) -> None:
    """Offers to the best (n) of each query what it meets in the cells that it visits.

    With `twins` (m) the queries are a part of the base: no row meets itself, and each pair is
    offered to both of its rows, so that it is enough if one of them visits the other.
    """
    lock = threading.Lock()

    def cell(number: int) -> None:
        asking = visits.queries[visits.starts[number] : visits.starts[number + 1]]
        for start in range(base.starts[number], base.starts[number + 1], BASE_ROWS):
            block = slice(start, min(start + BASE_ROWS, int(base.starts[number + 1])))
            products = Products(base.rows[block])
            for first in range(0, len(asking), QUERY_ROWS):
                mine = asking[first : first + QUERY_ROWS]
                _meet(queries, mine, base, block, products, best, twins, lock)

    occupied = (np.diff(base.starts) > 0) & (np.diff(visits.starts) > 0)
    work = np.flatnonzero(occupied)
    each(len(work), lambda i: cell(int(work[i])))


def _meet(
    queries: Queries,
    mine: Ints,
    base: Base,
    block: slice,
    products: Products,
    best: Best,
    twins: Best | None,
    lock: threading.Lock,
) -> None:
    asking = gathered(queries.rows, mine)
    slack = np.float32(products.slack)
    # Other threads may raise the floors meanwhile: then a few are offered in vain.
    floors = best.score[mine, 0] - slack
    other = twins.score[block, 0] - slack if twins else _NOTHING
    at_row, at_column = products.reaching(asking, floors, other)
    if not len(at_row):
        return
    found = np.empty(len(at_row), np.float32)
    _rescore(asking, base.rows[block], at_row, at_column, found)
    pairs = (mine[at_row], base.numbers[block][at_column], found)
    with lock:
        if twins is None:
            _offer_pairs(*pairs, best.score, best.number, False)
        else:
            numbers, column = queries.numbers[pairs[0]], block.start + at_column
            apart = numbers != pairs[1]
            rows, others, found = pairs[0][apart], pairs[1][apart], found[apart]
            _offer_pairs(rows, others, found, best.score, best.number, True)
            back = (column[apart], numbers[apart], found)
            _offer_pairs(*back, twins.score, twins.number, True)


@numba.njit(nogil=True, cache=True)
def _rescore(left: Floats, right: Floats, at_row: Ids, at_column: Ids, out: Floats) -> None:
    """One pair by one: the same bits however rows stand together in blocks."""
    for i in range(out.size):
        out[i] = fast_dot(left[at_row[i]], right[at_column[i]])


@numba.njit(nogil=True, cache=True)
def _offer_pairs(
    rows: Ints, others: Ints, found: Floats, score: Floats, number: Ints, again: bool
) -> None:
    for i in range(found.size):
        offer(score[rows[i]], number[rows[i]], found[i], others[i], again)
