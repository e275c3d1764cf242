"""Rows as searches multiply them: in 8 bits, whose products take half the time of bf16's and are
exact in whole numbers; in fp32 on processors that have no instruction for these.

How far each row is from its coarse one is known, and so is how far their products can be off.
"""

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt
import torch

from curation.algorithms import scans
from curation.algorithms.products import (
    PAD,
    ROUNDED,
    SQUARES_TILE,
    Floats,
    Ids,
    Ints,
    multiplied,
    multiplies_bytes,
    reached,
)
from curation.algorithms.tiles import buffer, each_tile

LARGEST = 127
LOOKED_AT = 8192  # rows whose numbers set the step: larger ones of others are cut, which loses more
SURELY = np.float32(1.001)  # times a sum in fp32 is not less than the exact one
INT32 = -(2.0**31), 2.0**31 - 1


@dataclass(frozen=True)
class Coarse:
    """`values` (n, D) times `step` are rows of norm 1 at most, but for vectors of norm `lost` (n,).
    There may be more values, which mean nothing."""

    values: torch.Tensor
    lost: Floats
    step: float = 1.0

    def __len__(self) -> int:
        return len(self.lost)

    @classmethod
    def of(cls, rows: Floats) -> "Coarse":
        """Of rows (n, D) of norm 1 at most, padded as products need it."""
        lost = np.zeros(len(rows), np.float32)
        if not multiplies_bytes():
            return cls(torch.from_numpy(rows), lost)
        some = rows[:: -(-len(rows) // LOOKED_AT) or 1]
        step = (float(np.abs(some).max(initial=0.0)) or 1.0) / LARGEST
        values = torch.zeros(len(rows) + -len(rows) % PAD, rows.shape[1], dtype=torch.int8)
        state = rows, np.float32(step), values.numpy(), lost
        each_tile(len(rows), SQUARES_TILE, lambda start, stop: _round(start, stop, *state))
        return cls(values, lost, step)

    def chosen(self, chosen: Ints, name: str) -> "Coarse":
        """Those at positions (m,), in this thread's scratch memory: valid until its next call by
        that name."""
        at = buffer(f"{name} at", (len(chosen) + -len(chosen) % PAD, 1), torch.int64)[:, 0]
        at.numpy()[: len(chosen)] = chosen
        at[len(chosen) :] = 0
        out = buffer(name, (len(at), self.values.shape[1]), self.values.dtype)
        values = torch.index_select(self.values, 0, at, out=out)
        return Coarse(values, self.lost[chosen], self.step)

    def off(self, others: "Coarse") -> Floats:
        """How far products of each row (n,) with any of the others can be off."""
        most = others.lost.max(initial=0)
        off: Floats = self.lost * (1 + most) + (most + np.float32(ROUNDED[torch.float32]))
        return off


class Scores:
    """Products of rows (n, D) and columns (m, D) as keys, in this thread's scratch memory: valid
    until it multiplies again. `off` (n,) bounds what those of each row can be off."""

    def __init__(self, rows: Coarse, columns: Coarse) -> None:
        scores = multiplied(rows.values, columns.values)[: len(rows)]
        whole = rows.values.dtype == torch.int8
        self._keys: scans.Keys = scores.numpy() if whole else scans.keys(scores)
        self._unit = rows.step * columns.step if whole else None
        self._columns, self.off = len(columns), rows.off(columns)

    def top(self, count: int) -> Floats:
        """What at least `count` of each row reach (n,), and few more."""
        least = scans.floors_of_top(self._keys, self._columns, count)
        if self._unit is None:
            return scans.scores_of(least)
        scores: Floats = least.astype(np.float32) * np.float32(self._unit)
        return scores

    def reaching(self, floors: Floats, others: Floats | None = None) -> tuple[Ids, Ids]:
        """Positions of row and column (p,) of the scores that reach a floor of their row (n,) or,
        with `others`, of their column (m,)."""
        none = np.empty(0, np.float32)
        of_rows, of_columns = (
            self._floors(one) for one in (floors, none if others is None else others)
        )
        return reached(self._keys, self._columns, of_rows, of_columns)

    def _floors(self, scores: Floats) -> scans.Keys:
        if self._unit is None:
            return scans.floors_of(scores, self._keys.dtype)
        whole = np.floor(scores.astype(np.float64) / self._unit)
        floors: scans.Keys = np.clip(whole, *INT32).astype(np.int32)
        return floors


@numba.njit(nogil=True, cache=True, fastmath={"nnan", "nsz", "reassoc", "contract"})
def _round(
    start: int, stop: int, rows: Floats, step: np.float32, out: npt.NDArray[np.int8], lost: Floats
) -> None:
    """Writes rows as whole numbers of steps, and the norms of what they lose."""
    per, most = np.float32(1.0) / step, np.float32(LARGEST)
    for i in range(start, stop):
        total = np.float32(0.0)
        for d in range(rows.shape[1]):
            whole = min(max(np.rint(rows[i, d] * per), -most), most)
            out[i, d] = np.int8(whole)
            gone = rows[i, d] - whole * step
            total += gone * gone
        lost[i] = np.sqrt(total) * SURELY
