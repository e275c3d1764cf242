"""Which columns are nearest to rows, by their products on a grid.

Numbers are rounded to whole numbers of 7 bits and powers of two, so that their products are exact
in any order: every machine, with a GPU or none, ranks alike. How well is for who asks to measure.
"""

import math

import numba
import numpy as np
import numpy.typing as npt
import torch

from curation.algorithms import scans
from curation.algorithms.products import PAD, TILE_ROWS, Floats, Ids, multiplied

BITS = 7
TOO_LARGE = np.float32(127.5)  # is rounded to 128

Bytes = npt.NDArray[np.int8]


class Ranking:
    """Of fixed `columns` (m, D), all in steps of the one with the largest number."""

    tile_rows = TILE_ROWS  # how many are best given at a time

    def __init__(self, columns: Floats) -> None:
        self._count, self._columns = len(columns), _padded(columns)
        flat = self._columns.numpy().reshape(1, -1)
        self._step = _rounded(columns.reshape(1, -1), flat)[0]

    def nearest(self, rows: Floats, count: int) -> tuple[Floats, Ids]:
        """The min(count, m) columns that score highest with rows (n, D), falling, of equal ones the
        smaller number: scores and numbers (n, t)."""
        found, unit = self._scores(rows)
        best, at = scans.top(found, self._count, min(count, self._count))
        return best.astype(np.float32) * unit[:, None], at

    def near(self, rows: Floats, within: scans.Within) -> Ids:
        """The numbers (n, most) of columns that score as `within` asks, in the same order;
        NONE after them."""
        found, unit = self._scores(rows)
        return scans.near(found, self._count, unit, within)

    def _scores(self, rows: Floats) -> tuple[scans.Keys, Floats]:
        """(n, m) whole numbers in this thread's scratch memory, and what one of them is (n,)."""
        values = _padded(rows)
        unit = _rounded(rows, values.numpy()) * self._step
        return multiplied(values, self._columns)[: len(rows)].numpy(), unit


def _padded(rows: Floats) -> torch.Tensor:
    return torch.zeros(len(rows) + -len(rows) % PAD, rows.shape[1], dtype=torch.int8)


def _rounded(rows: Floats, out: Bytes) -> Floats:
    """Writes rows (n, D) as whole numbers; returns the power of two (n,) that each is in steps of:
    the least by which its numbers have 7 bits."""
    steps = np.empty(len(rows), np.float32)
    _round(rows, out, steps)
    return steps


@numba.njit(nogil=True, cache=True)
def _round(rows: Floats, out: Bytes, steps: Floats) -> None:
    for i in range(rows.shape[0]):
        largest = np.float32(0.0)
        for d in range(rows.shape[1]):
            largest = max(largest, abs(rows[i, d]))
        power = math.frexp(largest)[1] - BITS
        step = np.float32(math.ldexp(1.0, power))
        if largest >= TOO_LARGE * step:
            step *= np.float32(2.0)
        steps[i] = step
        per = np.float32(1.0) / step
        for d in range(rows.shape[1]):
            out[i, d] = np.int8(np.rint(rows[i, d] * per))
