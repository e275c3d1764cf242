"""The nearest centroid of every row on a GPU, exactly, and what the rows of each add up to.

All rows are compared with all centroids in every call: that is faster there than reading bounds.
"""

import numpy as np
import torch
from torch import Tensor

from curation.algorithms import gpu
from curation.algorithms.equal import first_of_equal
from curation.algorithms.gpu import SLACK, sent
from curation.algorithms.lloyd import FIXED_BITS, Metric, Totals
from curation.algorithms.products import NONE, Floats, Ints

HELD_SHARE = 0.5  # of the free memory: rows up to so much stay on the GPU
MOVED_ROWS = 1 << 17  # added up at a time
LEAST_LENGTH = 1e-27
FAINT = 2e-6  # fp16 rounds off of components of any size


class GpuAssigner:
    """As `assign.Assigner`: the same rows (n, D) call after call, the same answers.

    Held between calls: the rows in fp32 if there is room on the GPU, else they are sent anew in
    every call; and 12 bytes a row.
    """

    def __init__(self, spherical: bool = True) -> None:
        self._spherical = spherical
        self._held: Tensor | None = None
        self._length = torch.empty(0)  # (n,) of each row
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
        columns = _Columns(centroids[kept], self._spherical, self._length)
        numbers, before, found = sent(kept), self._cluster, torch.empty_like(self._cluster)
        for start in range(0, len(rows), columns.tile_rows):
            tile = slice(start, start + columns.tile_rows)
            here = sent(rows[tile]) if self._held is None else self._held[tile]
            found[tile] = numbers[columns.nearest(here, self._length[tile])]
        self._cluster = found
        return before

    def _begin(self, rows: Floats) -> None:
        self._held = sent(rows) if rows.nbytes <= HELD_SHARE * gpu.free_bytes() else None
        spans = (slice(at, at + MOVED_ROWS) for at in range(0, max(1, len(rows)), MOVED_ROWS))
        tiles = (sent(rows[some]) if self._held is None else self._held[some] for some in spans)
        self._length = torch.cat([torch.linalg.vector_norm(tile, dim=1) for tile in tiles])
        self._cluster = torch.full((len(rows),), NONE, device=self._length.device)

    def _some(self, rows: Floats, some: Tensor) -> Tensor:
        if self._held is not None:
            return self._held[some]
        return sent(rows[some.numpy(force=True)])


class _Columns:
    """Distinct centroids (m, D), scaled so that neither they nor any row are longer than 1."""

    def __init__(self, centroids: Floats, spherical: bool, lengths: Tensor) -> None:
        self._exact, wide = sent(centroids), sent(centroids).double()
        squares = wide.square().sum(1)
        self._longest = float(squares.max().sqrt())
        longest = max([self._longest, *lengths.amax(0, keepdim=True).tolist()])
        self._scale = 2.0 ** -np.ceil(np.log2(max(longest, LEAST_LENGTH)))
        self._half = (self._exact * self._scale).half()
        self._bias = None if spherical else -0.5 * squares
        self.tile_rows = max(1, gpu.SCORES // len(centroids))

    def nearest(self, rows: Tensor, lengths: Tensor) -> Tensor:
        """The nearest (n,) of rows (n, D) of these lengths (n,)."""
        scores = gpu.product((rows * self._scale).half(), self._half)
        if self._bias is not None:
            scores = scores.float() + (self._bias * self._scale**2).float()
        best, at = scores.max(1)
        slack = FAINT + SLACK * self._scale**2 * self._longest * lengths
        reached = scores >= (best.float() - 2 * slack)[:, None]
        doubt = (reached.sum(1) > 1).nonzero()[:, 0]
        row, column = reached[doubt].nonzero().T
        exact = gpu.dots(rows[doubt], self._exact, row, column)
        if self._bias is not None:
            exact += self._bias[column]
        largest = torch.full((len(doubt),), -torch.inf, dtype=exact.dtype, device=exact.device)
        largest.scatter_reduce_(0, row, exact, "amax")
        tied = exact == largest[row]
        first = torch.full_like(doubt, len(self._exact))
        at[doubt] = first.scatter_reduce_(0, row[tied], column[tied], "amin")
        return at
