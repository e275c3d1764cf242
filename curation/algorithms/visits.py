"""Rows, the cells that they lie in, and which rows visit them: what `search.search` takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np

from curation.algorithms import gpu
from curation.algorithms.best import Best
from curation.algorithms.coarse import Coarse
from curation.algorithms.products import Floats, Ids, Ints


@dataclass(frozen=True)
class Rows:
    """Vectors (n, D) and their numbers (n,)."""

    vectors: Floats
    numbers: Ints

    def __len__(self) -> int:
        return len(self.vectors)

    @cached_property
    def coarse(self) -> Coarse:
        """The vectors as products take them; kept, since every cell takes some of them."""
        return Coarse.of(self.vectors)

    @cached_property
    def on_gpu(self) -> gpu.Held:
        """The same on a GPU."""
        return gpu.Held.of(self.vectors, self.numbers)


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
