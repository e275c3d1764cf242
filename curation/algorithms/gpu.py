"""What searches on a GPU are made of: products in fp16, and in fp64 what these leave in doubt.

fp16 and not bf16: as fast on every GPU with tensor cores, V100 included, and eight times finer, so
that few scores are in doubt. Unit rows, and rows scaled to be no longer, are in its range. Answers
are those of the processor, but for scores that differ by less than fp32 can tell.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from curation.algorithms.products import NONE, Floats, Ints
from curation.algorithms.ranking import BITS, TOO_LARGE
from curation.algorithms.scans import MANY, Within

HALF = 2.0**-11  # of a number: what fp16 rounds off
ROUNDED = 1e-5  # of |row| |column|: what summing in fp32 does
# Of rows and columns no longer than 1: both are rounded, and so is their product.
SLACK = 3 * HALF + ROUNDED
SCORES = 1 << 27  # of a tile
HELD_SHARE = 0.5  # of the free memory, for what stays there
PAIRS = 1 << 18  # compared in fp64 at a time


def has_room(needed: int) -> bool:
    """Whether so many bytes can stay on the GPU, beside as much to work with."""
    return needed <= HELD_SHARE * free_bytes()


def free_bytes() -> int:
    """What is free of the GPU's memory."""
    on = device()
    return torch.cuda.mem_get_info(on)[0] if on and on.type == "cuda" else 0


def device() -> torch.device | None:
    """The GPU that large products are computed on, if there is one."""
    return torch.device("cuda") if torch.cuda.is_available() else None


@dataclass(frozen=True)
class Held:
    """Rows (n, D) on a GPU, in fp32 and fp16, and their numbers (n,)."""

    rows: Tensor
    half: Tensor
    numbers: Tensor

    @classmethod
    def of(cls, rows: Floats, numbers: Ints) -> "Held":
        here = sent(rows)
        return cls(here, here.half(), sent(numbers))


def sent(array: np.ndarray) -> Tensor:
    """The array on the GPU."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device())


def product(left: Tensor, right: Tensor) -> Tensor:
    """left (…, n, D) . right (…, m, D): (…, n, m) in fp16, of fp16 summed in fp32."""
    before = torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    try:
        return left @ right.mT
    finally:
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = before


def dots(left: Tensor, right: Tensor, at_left: Tensor, at_right: Tensor) -> Tensor:
    """left[at_left] . right[at_right] (p,) in fp64: the same however the pairs stand together."""
    found = torch.empty(len(at_left), dtype=torch.float64, device=left.device)
    for start in range(0, len(found), PAIRS):
        some = slice(start, start + PAIRS)
        torch.sum(left[at_left[some]].double() * right[at_right[some]], 1, out=found[some])
    return found


def in_order(row: Tensor, number: Tensor, score: Tensor) -> Tensor:
    """An order (p,) of pairs: by row, falling fp32 score, number."""
    bits = (score + 0.0).view(torch.int32)  # no negative zero
    rising = torch.where(bits < 0, bits ^ torch.iinfo(torch.int32).max, bits)
    order = torch.argsort(number, stable=True)
    key = (row.long() << 32) - rising.long()
    return order[torch.argsort(key[order], stable=True)]


def places(row: Tensor) -> Tensor:
    """Of rows (p,) in order: how many equal ones stand before each (p,)."""
    at = torch.arange(len(row), device=row.device)
    begins = torch.ones_like(row, dtype=torch.bool)
    begins[1:] = row[1:] != row[:-1]
    return at - torch.where(begins, at, 0).cummax(0)[0]


def on_grid(rows: Tensor, largest: Tensor) -> Tensor:
    """Rows (n, D) rounded as `ranking` does it, by their largest numbers (n, 1) or (1, 1)."""
    step = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - BITS)
    step = torch.where(largest >= float(TOO_LARGE) * step, 2 * step, step)
    return torch.round(rows / step) * step


class Columns:
    """Unit columns (m, D) on a GPU, and which of them are nearest to unit rows: `Ranking` there."""

    def __init__(self, columns: Floats) -> None:
        here = sent(columns)
        self._exact = on_grid(here, here.abs().amax()[None, None])
        self._half = self._exact.half()

    @property
    def tile_rows(self) -> int:
        """How many rows are best given at a time."""
        return max(1, SCORES // len(self._exact))

    def nearest(self, rows: Floats, count: int) -> tuple[Floats, Ints]:
        """As `Ranking.nearest`."""
        count = min(count, len(self._exact))
        here, scores = self._scores(rows)
        return self._ranked(here, scores, _least_of_top(scores, count), count)

    def near(self, rows: Floats, within: Within) -> Ints:
        """As `Ranking.near`, with no more columns than some row needs."""
        here, scores = self._scores(rows)
        share_of_best, most = within.share * _least_of_top(scores, 1), len(within.margins)
        floors = torch.full_like(share_of_best, -torch.inf)
        # Those that come before the count-th reach what that one does, all others its margin.
        for count in (within.least, max(within.least, MANY)):
            count = min(count, most, scores.shape[1])
            others = share_of_best - float(within.margins[count - 1])
            floors = floors.maximum(others.minimum(_least_of_top(scores, count)))
        score, number = self._ranked(here, scores, floors, most)
        lowest = np.float32(within.share) * score[:, :1] - within.margins[: score.shape[1]]
        number[:, within.least :][(score < lowest)[:, within.least :]] = NONE
        return number

    def _scores(self, rows: Floats) -> tuple[Tensor, Tensor]:
        here = sent(rows)
        here = on_grid(here, here.abs().amax(1, keepdim=True))
        return here, product(here.half(), self._half)

    def _ranked(
        self, rows: Tensor, scores: Tensor, floors: Tensor, count: int
    ) -> tuple[Floats, Ints]:
        """The best `count` of what may reach floors (n,), or fewer if no more do: (n, t)."""
        row, column = (scores >= (floors - 2 * SLACK)[:, None]).nonzero().T
        exact = dots(rows, self._exact, row, column).float()
        order = in_order(row, column, exact)
        row, place = row[order], places(row[order])
        count = min(count, 1 + int(place.max()))
        kept = place < count
        at = row[kept], place[kept]
        score = torch.full((len(rows), count), -torch.inf, device=rows.device)
        number = torch.full_like(score, NONE, dtype=torch.int64)
        score[at], number[at] = exact[order][kept], column[order][kept]
        return score.numpy(force=True), number.numpy(force=True)


def _least_of_top(scores: Tensor, count: int) -> Tensor:
    """The score (n,) that `count` of each row (n, m) reach."""
    if count == 1:
        return scores.amax(1).float()
    return scores.topk(count, dim=1, sorted=False)[0].amin(1).float()
