"""`search.search` on a GPU: many cells at a time, and the best pairs so far kept sorted there."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curation.algorithms import gpu
from curation.algorithms.best import Best
from curation.algorithms.gpu import SLACK, Held, sent
from curation.algorithms.products import NONE, Ints
from curation.algorithms.visits import Base, Rows, Twins, Visits

PENDING = 1 << 24  # pairs that wait to be compared in fp64
LEAST_ROWS = 256  # so many are counted at least: what is gathered takes room as well


def search(queries: Rows, visits: Visits, base: Base, best: Best, twins: Twins | None) -> None:
    """As `search.search`, of unit rows. Queries and base stand on the GPU whole: six bytes a
    component, and twenty a neighbour that is kept."""
    kept = _Kept(best)
    met = _Met(queries.on_gpu, base.rows.on_gpu, kept, None, None)
    if twins:
        twin = kept if twins.best is best else _Kept(twins.best)
        met = _Met(queries.on_gpu, base.rows.on_gpu, kept, twin, sent(twins.at))
    visiting, members = sent(visits.queries), sent(base.members)
    asking, held = np.diff(visits.starts), np.diff(base.starts)
    for cells in _alike(asking, held):
        here = _Slices.of(members, base.starts[cells], held[cells])
        most = int(asking[cells].max())
        step = max(1, gpu.SCORES // max(LEAST_ROWS, here.at.numel()))
        for first in range(0, most, step):
            count = np.clip(asking[cells] - first, 0, step)
            met.look(_Slices.of(visiting, visits.starts[cells] + first, count), here)
    met.settle()
    for one in {id(one): one for one in (met.kept, met.twin) if one}.values():
        one.give_back()


def has_room(queries: Rows, base: Base, best: Best) -> bool:
    """Whether a search of these can be made on the GPU."""
    both = {id(rows): rows for rows in (queries, base.rows) if "on_gpu" not in vars(rows)}
    held = sum(6 * rows.vectors.size for rows in both.values())
    return gpu.has_room(held + 20 * best.number.size)


def _alike(asking: Ints, held: Ints) -> Iterator[Ints]:
    """Cells (b,) in which rows ask (c,) and lie (c,), alike in size: products of a whole batch are
    one step for the GPU, which a single cell would not fill."""
    occupied = np.flatnonzero((asking > 0) & (held > 0))
    order = occupied[np.lexsort((held[occupied], asking[occupied]))]
    start, most = 0, LEAST_ROWS
    for stop, cell in enumerate(order.tolist()):  # of a batch the last asks most
        most = max(most, int(held[cell]))
        scores = (stop - start + 1) * most * max(LEAST_ROWS, int(asking[cell]))
        if scores > gpu.SCORES and stop > start:
            yield order[start:stop]
            start, most = stop, max(LEAST_ROWS, int(held[cell]))
    if len(order):
        yield order[start:]


@dataclass(frozen=True)
class _Slices:
    """Positions (b, m) of rows, and which are real (b, m): shorter slices are filled up."""

    at: Tensor
    real: Tensor

    @classmethod
    def of(cls, positions: Tensor, starts: Ints, counts: Ints) -> "_Slices":
        """positions[start : start + count] of each."""
        places = torch.arange(int(counts.max()), device=positions.device)
        real = places < sent(counts)[:, None]
        return cls(positions[torch.where(real, sent(starts)[:, None] + places, 0)], real)


class _Kept:
    """The k best of each row, sorted: row (p,), number (p,), score (p,)."""

    def __init__(self, best: Best) -> None:
        self._best, self.k = best, best.score.shape[1]
        number, score = sent(best.number), sent(best.score)
        at = (number != NONE).nonzero()
        self._pairs = at[:, 0], number[at[:, 0], at[:, 1]], score[at[:, 0], at[:, 1]]
        self._least = torch.where(number == NONE, score, -torch.inf).amax(1)
        self.floors = score.amin(1)  # what can still get in reaches this

    def add(self, row: Tensor, number: Tensor, score: Tensor) -> None:
        """Offers pairs (p,) in fp32, some perhaps again."""
        better = score > self._least[row]
        new = row[better], number[better], score[better]
        row, number, score = (torch.cat(both) for both in zip(self._pairs, new, strict=True))
        order = gpu.in_order(row, number, score)
        row, number, score = row[order], number[order], score[order]
        first = torch.ones_like(row, dtype=torch.bool)
        first[1:] = (row[1:] != row[:-1]) | (number[1:] != number[:-1])
        row, number, score = row[first], number[first], score[first]
        place = gpu.places(row)
        best = place < self.k
        self._pairs = row[best], number[best], score[best]
        last = place == self.k - 1
        self.floors[row[last]] = torch.maximum(self.floors[row[last]], score[last])

    def give_back(self) -> None:
        """Writes the heaps: worst first, and what is free before that."""
        row, number, score = self._pairs
        scores = self._least[:, None].repeat(1, self.k)
        numbers = torch.full_like(scores, NONE, dtype=torch.int64)
        at = row, self.k - 1 - gpu.places(row)
        scores[at], numbers[at] = score, number
        torch.from_numpy(self._best.score).copy_(scores)
        torch.from_numpy(self._best.number).copy_(numbers)


class _Met:
    """Pairs of positions (p,) of a query and a base row that may be among the best."""

    def __init__(
        self, asked: Held, held: Held, kept: _Kept, twin: _Kept | None, at: Tensor | None
    ) -> None:
        self._asked, self._held, self.kept, self.twin, self._at = asked, held, kept, twin, at
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._count = 0

    def look(self, mine: _Slices, members: _Slices) -> None:
        """Rows at positions `mine` (b, n) meet the base's rows at `members` (b, m)."""
        scores = gpu.product(self._asked.half[mine.at], self._held.half[members.at])
        reaching = self._reaching(scores, mine, members)
        enough = self.kept.k + (self.twin is not None)  # the row itself may be among them
        if len(reaching) > enough * mine.at.numel() and members.at.shape[1] > enough:
            scores.masked_fill_(~members.real[:, None], -torch.inf)
            floors = scores.topk(enough, sorted=False)[0].amin(-1).float() - SLACK
            floors.masked_fill_(~mine.real, -torch.inf)
            self.kept.floors.scatter_reduce_(0, mine.at.ravel(), floors.ravel(), "amax")
            reaching = self._reaching(scores, mine, members)
        batch, row, column = reaching.T
        self._waiting.append((mine.at[batch, row], members.at[batch, column]))
        self._count += len(batch)
        if self._count > PENDING:
            self.settle()

    def _reaching(self, scores: Tensor, mine: _Slices, members: _Slices) -> Tensor:
        """Places (p, 3) of scores (b, n, m) that may be among the best."""
        reached = scores >= (self.kept.floors[mine.at] - SLACK)[:, :, None]
        if self.twin and self._at is not None:
            reached |= scores >= (self.twin.floors[self._at[members.at]] - SLACK)[:, None]
        return reached.logical_and_(mine.real[:, :, None] & members.real[:, None]).nonzero()

    def settle(self) -> None:
        """Compares what waits exactly, and keeps the best."""
        if not self._count:
            return
        query, member = (torch.cat(some) for some in zip(*self._waiting, strict=True))
        self._waiting, self._count = [], 0
        score = gpu.dots(self._asked.rows, self._held.rows, query, member).float()
        own, number = self._asked.numbers[query], self._held.numbers[member]
        if self.twin is None or self._at is None:
            self.kept.add(query, number, score)
            return
        apart = own != number
        ways = (query[apart], number[apart]), (self._at[member[apart]], own[apart])
        if self.twin is self.kept:
            row, other = (torch.cat(both) for both in zip(*ways, strict=True))
            self.kept.add(row, other, score[apart].repeat(2))
            return
        self.kept.add(*ways[0], score[apart])
        self.twin.add(*ways[1], score[apart])
