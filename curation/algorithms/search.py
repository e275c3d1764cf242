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
    """Rows (m, D), their numbers (m,), the positions of those in cells in order of these (m',), and
    where each cell starts (c+1,)."""

    rows: Floats
    numbers: Ints
    members: Ints
    starts: Ints

    @classmethod
    def of(cls, rows: Floats, numbers: Ints, cell: Ints, cells: int) -> "Base":
        """By the cell (m,) of each row; those in none, a negative one, are left out."""
        order = np.argsort(cell, kind="stable")
        order = order[np.searchsorted(cell[order], 0) :]
        return cls(rows, numbers, order, np.searchsorted(cell[order], np.arange(cells + 1)))

    @classmethod
    def in_order(cls, rows: Floats, numbers: Ints, starts: Ints) -> "Base":
        """Of rows that stand in order of their cells."""
        return cls(rows, numbers, np.arange(len(rows)), starts)


@dataclass(frozen=True)
class Visits:
    """The positions of the queries that ask in each cell, and where each cell's start (c+1,)."""

    queries: Ints
    starts: Ints

    @classmethod
    def of(cls, cells: Ids | Ints, count: int) -> "Visits":
        """From the cells (n, p) that each query asks in, of `count`; negative: none."""
        starts = np.zeros(count + 2, np.int64)
        _count_visits(cells, starts)
        np.cumsum(starts, out=starts)
        queries = np.empty(starts[-1], np.int64)
        _list_visits(cells, starts, queries)
        return cls(queries, starts[:-1])


@dataclass(frozen=True)
class Queries:
    """Rows (n, D) and their numbers (n,)."""

    rows: Floats
    numbers: Ints


@dataclass(frozen=True)
class Twins:
    """Where base rows that are queries themselves find their best: `best[at]`, at (m,)."""

    best: Best
    at: Ints


def search(
    queries: Queries, visits: Visits, base: Base, best: Best, twins: Twins | None = None
) -> None:
    """Offers to the best (n) of each query what it meets in the cells that it visits.

    With `twins` the queries are a part of the base: no row meets itself, and each pair is offered
    to both of its rows, so that it is enough if one of them visits the other.
    """
    lock = threading.Lock()

    def cell(number: int) -> None:
        asking = visits.queries[visits.starts[number] : visits.starts[number + 1]]
        for start in range(base.starts[number], base.starts[number + 1], BASE_ROWS):
            members = base.members[start : min(start + BASE_ROWS, base.starts[number + 1])]
            block = Block(members, gathered(base.rows, members, "base"))
            products = Products(block.rows)
            for first in range(0, len(asking), QUERY_ROWS):
                mine = asking[first : first + QUERY_ROWS]
                _meet(queries, mine, base, block, products, best, twins, lock)

    occupied = (np.diff(base.starts) > 0) & (np.diff(visits.starts) > 0)
    work = np.flatnonzero(occupied)
    each(len(work), lambda i: cell(int(work[i])))


@dataclass(frozen=True)
class Block:
    """Base rows (b, D) at positions (b,)."""

    members: Ints
    rows: Floats


def _meet(
    queries: Queries,
    mine: Ints,
    base: Base,
    block: Block,
    products: Products,
    best: Best,
    twins: Twins | None,
    lock: threading.Lock,
) -> None:
    asking = gathered(queries.rows, mine, "queries")
    slack = np.float32(products.slack)
    # Other threads may raise the floors meanwhile: then a few are offered in vain.
    floors = best.score[mine, 0] - slack
    other = twins.best.score[twins.at[block.members], 0] - slack if twins else _NOTHING
    at_row, at_column = products.reaching(asking, floors, other)
    if not len(at_row):
        return
    found = np.empty(len(at_row), np.float32)
    _rescore(asking, block.rows, at_row, at_column, found)
    column = block.members[at_column]
    pairs = (mine[at_row], base.numbers[column], found)
    with lock:
        if twins is None:
            _offer_pairs(*pairs, best.score, best.number, False)
        else:
            numbers, twin = queries.numbers[pairs[0]], twins.at[column]
            apart = numbers != pairs[1]
            rows, others, found = pairs[0][apart], pairs[1][apart], found[apart]
            _offer_pairs(rows, others, found, best.score, best.number, True)
            back = (twin[apart], numbers[apart], found)
            _offer_pairs(*back, twins.best.score, twins.best.number, True)


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


@numba.njit(nogil=True, cache=True)
def _count_visits(cells: Ids | Ints, starts: Ints) -> None:
    """Adds the visits to cell c to `starts`, two places on."""
    for cell in cells.flat:
        if cell >= 0:
            starts[cell + 2] += 1


@numba.njit(nogil=True, cache=True)
def _list_visits(cells: Ids | Ints, starts: Ints, queries: Ints) -> None:
    """Writes queries in order of cells; `starts`, one place on, ends where the next begins."""
    for i in range(cells.shape[0]):
        for slot in range(cells.shape[1]):
            if cells[i, slot] >= 0:
                place = cells[i, slot] + 1
                queries[starts[place]] = i
                starts[place] += 1
