"""Exact search inside cells: each is read once and answered for all queries that ask in it."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np
import torch

from curation.algorithms.best import Best, offer
from curation.algorithms.products import Floats, Ids, Ints, Products, chosen_of, fast_dot, rounded
from curation.algorithms.tiles import each

QUERY_ROWS = 4096
BASE_ROWS = 2048


@dataclass(frozen=True)
class Rows:
    """Vectors (n, D) and their numbers (n,)."""

    vectors: Floats
    numbers: Ints

    def __len__(self) -> int:
        return len(self.vectors)

    @cached_property
    def rounded(self) -> torch.Tensor:
        """The vectors as products take them; kept, since every cell takes some of them."""
        return rounded(self.vectors)


@dataclass(frozen=True)
class Base:
    """Rows (m, D), the positions of those in cells in order of these (m',), and where each cell
    starts (c+1,)."""

    rows: Rows
    members: Ints
    starts: Ints

    @classmethod
    def of(cls, rows: Rows, cell: Ints, cells: int) -> "Base":
        """By the cell (m,) of each row; those in none, a negative one, are left out."""
        order = np.argsort(cell, kind="stable")
        order = order[np.searchsorted(cell[order], 0) :]
        return cls(rows, order, np.searchsorted(cell[order], np.arange(cells + 1)))

    @classmethod
    def in_order(cls, rows: Rows, starts: Ints) -> "Base":
        """Of rows that stand in order of their cells."""
        return cls(rows, np.arange(len(rows)), starts)


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

    @classmethod
    def joined(cls, parts: "Sequence[Visits]") -> "Visits":
        """Of parts of the queries, in their order."""
        starts = np.sum([part.starts for part in parts], axis=0)
        queries, filled = np.empty(starts[-1], np.int64), starts[:-1].copy()
        for part in parts:
            counts = np.diff(part.starts)
            places = np.repeat(filled - part.starts[:-1], counts) + np.arange(len(part.queries))
            queries[places] = part.queries
            filled += counts
        return cls(queries, starts)


@dataclass(frozen=True)
class Twins:
    """Where base rows that are queries themselves find their best: `best[at]`, at (m,)."""

    best: Best
    at: Ints


def search(
    queries: Rows, visits: Visits, base: Base, best: Best, twins: Twins | None = None
) -> None:
    """Offers to the best (n) of each query what it meets in the cells that it visits.

    With `twins` the queries are a part of the base: no row meets itself, and each pair is offered
    to both of its rows, so that it is enough if one of them visits the other.
    """
    meeting = _Meeting(queries, base, best, twins, threading.Lock())
    asked, held = queries.rounded, base.rows.rounded

    def cell(number: int) -> None:
        asking = visits.queries[visits.starts[number] : visits.starts[number + 1]]
        for start in range(base.starts[number], base.starts[number + 1], BASE_ROWS):
            members = base.members[start : min(start + BASE_ROWS, base.starts[number + 1])]
            products = Products(chosen_of(held, members, "base"))
            for first in range(0, len(asking), QUERY_ROWS):
                mine = asking[first : first + QUERY_ROWS]
                meeting.of(mine, chosen_of(asked, mine, "queries"), members, products)

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

    def of(self, mine: Ints, asking: torch.Tensor, members: Ints, products: Products) -> None:
        """Rows at positions `mine` (n,) meet the base's rows at `members` (m,)."""
        slack, twins = np.float32(products.slack), self.twins
        # Other threads may raise the floors meanwhile: then a few are offered in vain.
        floors = self.best.score[mine, 0] - slack
        if twins:
            others = twins.best.score[twins.at[members], 0] - slack
        else:
            others = np.full(len(members), np.inf, np.float32)
        best = self.best.score.shape[1] + (twins is not None)  # and itself
        at_row, at_column = products.reaching(asking, floors, others, best)
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
