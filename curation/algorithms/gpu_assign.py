"""The nearest centroid of every row on a GPU, exactly, and what the rows of each add up to.

All rows are compared with all centroids in every call: that is faster there than reading bounds.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curation.algorithms import gpu
from curation.algorithms.equal import first_of_equal
from curation.algorithms.gpu import HALF, ROUNDED, sent
from curation.algorithms.lloyd import FIXED_BITS, Metric, Totals
from curation.algorithms.products import NONE, Floats, Ints

MOVED_ROWS = 1 << 17  # added up at a time
LEAST_LENGTH = 1e-27
FAINT = 4e-6  # fp16 rounds off of components of any size


class GpuAssigner:
    """As `assign.Assigner`: the same rows (n, D) call after call, the same answers.

    Held between calls: the rows in fp32 if there is room on the GPU, else they are sent anew in
    every call; and 12 bytes a row.
    """

    def __init__(self, spherical: bool = True) -> None:
        self._spherical = spherical
        self._held: Tensor | None = None
        self._rounding = _Rounding(torch.empty(0), torch.empty(0))
        self._cluster = torch.empty(0, dtype=torch.int64)

    def __call__(self, rows: Floats, centroids: Floats) -> Ints:
        """Number (n,) of the nearest centroid of every row."""
        self._assign(rows, centroids)
        cluster: Ints = self._cluster.numpy(force=True)
        return cluster

    def totals(self, rows: Floats, centroids: Floats, metric: Metric) -> Totals:
        """How the totals of rows, put to their nearest centroids, differ from the last call's."""
        before = self._assign(rows, centroids)
        sums = torch.zeros(centroids.shape, dtype=torch.int64, device=before.device)
        counts = torch.zeros(len(centroids), dtype=torch.int64, device=before.device)
        moved = (before != self._cluster).nonzero()[:, 0]
        for some in torch.split(moved, MOVED_ROWS):
            scaled = self._some(rows, some) * 2.0 ** (FIXED_BITS - metric.exponent)
            fixed, into, out_of = scaled.round().long(), self._cluster[some], before[some]
            sums.index_add_(0, into, fixed)  # whole numbers: in any order
            counts += torch.bincount(into, minlength=len(counts))
            left = out_of != NONE
            sums.index_add_(0, out_of[left], fixed[left], alpha=-1)
            counts -= torch.bincount(out_of[left], minlength=len(counts))
        return Totals(sums.numpy(force=True), counts.numpy(force=True))

    def _assign(self, rows: Floats, centroids: Floats) -> Tensor:
        """Finds the nearest of all rows; returns those of the last call (n,), at first NONE."""
        if len(self._cluster) != len(rows):
            self._begin(rows)
        firsts = first_of_equal(centroids)
        kept = np.flatnonzero(firsts == np.arange(len(firsts)))  # a repeated one gets no rows
        columns = _Columns(centroids[kept], self._spherical, self._rounding.longest)
        numbers, before, found = sent(kept), self._cluster, torch.empty_like(self._cluster)
        for start in range(0, len(rows), columns.tile_rows):
            tile = slice(start, start + columns.tile_rows)
            here = sent(rows[tile]) if self._held is None else self._held[tile]
            found[tile] = numbers[columns.nearest(here, self._rounding.some(tile))]
        self._cluster = found
        return before

    def _begin(self, rows: Floats) -> None:
        self._held = sent(rows) if gpu.has_room(rows.nbytes) else None
        spans = (slice(at, at + MOVED_ROWS) for at in range(0, max(1, len(rows)), MOVED_ROWS))
        tiles = (sent(rows[some]) if self._held is None else self._held[some] for some in spans)
        self._rounding = _Rounding.joined([_Rounding.of(tile) for tile in tiles])
        self._cluster = torch.full((len(rows),), NONE, device=self._rounding.length.device)

    def _some(self, rows: Floats, some: Tensor) -> Tensor:
        if self._held is not None:
            return self._held[some]
        return sent(rows[some.numpy(force=True)])


@dataclass(frozen=True)
class _Rounding:
    """Lengths of rows (n,) and of what they lose in fp16 (n,)."""

    length: Tensor
    lost: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "_Rounding":
        length = torch.linalg.vector_norm(rows, dim=1)
        scale = torch.exp2(length.clamp_min(LEAST_LENGTH).log2().ceil())[:, None]
        scaled = rows / scale
        off = torch.linalg.vector_norm(scaled - scaled.half().float(), dim=1)
        return cls(length, off * scale[:, 0] * (1 + HALF))

    @classmethod
    def joined(cls, parts: "list[_Rounding]") -> "_Rounding":
        return cls(torch.cat([p.length for p in parts]), torch.cat([p.lost for p in parts]))

    @property
    def longest(self) -> float:
        return max(self.length.amax(0, keepdim=True).tolist(), default=0.0)

    def some(self, which: slice) -> "_Rounding":
        return _Rounding(self.length[which], self.lost[which])


class _Columns:
    """Distinct centroids (m, D), scaled so that neither they nor any row are longer than 1."""

    def __init__(self, centroids: Floats, spherical: bool, longest: float) -> None:
        self._exact = sent(centroids)
        rounding = _Rounding.of(self._exact)
        self._longest, self._lost = rounding.longest, float(rounding.lost.amax())
        most = max(self._longest, longest, LEAST_LENGTH)
        self._scale = 2.0 ** -np.ceil(np.log2(most))
        self._half = (self._exact * self._scale).half()
        self._bias = None if spherical else -0.5 * self._exact.double().square().sum(1)
        self.tile_rows = max(1, gpu.SCORES // len(centroids))

    def nearest(self, rows: Tensor, rounding: _Rounding) -> Tensor:
        """The nearest (n,) of rows (n, D)."""
        scores = gpu.product((rows * self._scale).half(), self._half)
        if self._bias is not None:
            scores = scores.float() + (self._bias * self._scale**2).float()
        best, at = scores.max(1)
        floors = best.float() - 2 * self._slack(rounding)
        scores.scatter_(1, at[:, None], -torch.inf)
        doubt = (scores.amax(1) >= floors).nonzero()[:, 0]
        row, column = (scores[doubt] >= floors[doubt, None]).nonzero().T
        row = torch.cat([row, torch.arange(len(doubt), device=row.device)])
        column = torch.cat([column, at[doubt]])
        exact = gpu.dots(rows[doubt], self._exact, row, column)
        if self._bias is not None:
            exact += self._bias[column]
        largest = torch.full((len(doubt),), -torch.inf, dtype=exact.dtype, device=exact.device)
        largest.scatter_reduce_(0, row, exact, "amax")
        tied = exact == largest[row]
        first = torch.full_like(doubt, len(self._exact))
        at[doubt] = first.scatter_reduce_(0, row[tied], column[tied], "amin")
        return at

    def _slack(self, rounding: _Rounding) -> Tensor:
        """How far scaled scores of rows (n,) can be off (n,)."""
        length, lost = rounding.length, rounding.lost
        off = lost * self._longest + (length + lost) * self._lost
        off += (HALF + ROUNDED) * length * self._longest
        slack: Tensor = off * self._scale**2 + FAINT
        return slack
