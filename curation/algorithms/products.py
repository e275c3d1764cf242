"""Blocks of products, and what is asked of them: what k-means and the kNN join are made of."""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

from curation.algorithms import scans
from curation.algorithms.tiles import buffer, each_tile

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]

# Of |row| |column|: how far a product of numbers that are in this precision can lie from the true
# one. fp32 errs by a few 1e-7 at a thousand dimensions; bf16 keeps 8 bits of the result.
ROUNDED = {torch.float32: 1e-5, torch.bfloat16: 1e-5 + 2.0**-8}
# The same of any numbers: bf16 keeps 8 bits of each factor as well.
SLACK = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}

SQUARES_TILE = 8192
TILE_ROWS = 1024  # what fits a core's cache with its scores
PAD = 64

NOTHING = np.empty(0, np.float32)
NONE = -1  # the number of what isn't there

# fp32 by oneDNN, for tiles of one shape: torch.mm asks MKL, which is half as fast on processors of
# other makers, for which it doesn't use AVX-512.
_mkldnn_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def fast_dtype() -> torch.dtype:
    """bf16 where the processor multiplies matrices of it faster, else fp32.

    That is on those with AMX or AVX-512 BF16.
    """
    faster = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if faster else torch.float32


@dataclass(frozen=True)
class Within:
    """Columns that score at least `share` of a row's largest score less `margin`: of each row the
    `least` best whatever they score, and `most` at most."""

    share: float
    margin: float
    least: int
    most: int


class Products:
    """Scores of rows against fixed `columns` (m, D): row . column + bias.

    `slack` bounds what a score can be off for rows of norm 1.
    """

    tile_rows = TILE_ROWS  # how many are best given at a time

    def __init__(
        self,
        columns: Floats | torch.Tensor,
        bias: Floats | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._dtype = dtype or fast_dtype()
        self._exact, self._count = columns, len(columns)
        self._pad = self._dtype != torch.float32
        self._columns = torch.as_tensor(columns).to(self._dtype)
        norms = torch.linalg.vector_norm(self._columns, dim=1, dtype=torch.float32)
        longest = float(norms.max()) * (1 + SLACK[self._dtype]) if self._count else 0.0
        if self._pad:
            self._columns = _padded(self._columns, self._dtype)
        none = bias is None or not bias.any()
        self._bias = None if none else torch.from_numpy(bias)
        self.slack = SLACK[self._dtype] * longest

    def scores(self, rows: Floats) -> Floats:
        """(n, m) scores of rows (n, D) in fp32: good until this thread's next call."""
        scores: Floats = self._scores(rows)[:, : self._count].float().numpy(force=True)
        return scores

    def top(self, rows: Floats, count: int) -> tuple[Floats, Ids]:
        """The min(count, m) largest scores of rows (n, D), falling, and their columns: (n, t)."""
        count, scores = min(count, self._count), self._scores(rows)
        if count <= scans.RANKED:
            best, at = scans.top(scans.keys(scores), self._count, count)
            return scans.scores_of(best), at
        largest, places = scores[:, : self._count].float().topk(count, dim=1)
        return largest.numpy(force=True), places.to(torch.int32).numpy(force=True)

    def nearest(self, rows: Floats, count: int) -> tuple[Floats, Ints]:
        """The min(count, m) columns of largest product with rows (n, D), largest first, of equal
        ones the smaller number: products in fp32, and numbers (n, t). For rows of norm 1 and no
        bias. What products in another precision leave in doubt is compared in fp32.
        """
        count, found = min(count, self._count), scans.keys(self._scores(rows))
        return self._ranked(rows, found, self._top(found, count), count)

    def near(self, rows: Floats, within: Within) -> tuple[Floats, Ints]:
        """The same of columns that score as `within` asks (n, within.most); NONE after them."""
        found = scans.keys(self._scores(rows))
        floors = within.share * self._top(found, 1) - within.margin
        floors = np.minimum(floors, self._top(found, min(within.least, self._count)))
        score, number = self._ranked(rows, found, floors, within.most)
        floors = np.float32(within.share) * score[:, :1] - np.float32(within.margin)
        number[:, within.least :][score[:, within.least :] < floors] = NONE
        return score, number

    def _top(self, found: scans.Keys, count: int) -> Floats:
        """What at least `count` of each row reach (n,), and few more."""
        return scans.scores_of(scans.floors_of_top(found, self._count, count))

    def _ranked(
        self, rows: Floats, found: scans.Keys, floors: Floats, count: int
    ) -> tuple[Floats, Ints]:
        """The best `count` (n, t) of what may reach floors (n,), by products in fp32."""
        floors = np.maximum(floors - 2 * self.slack, np.finfo(np.float32).min).astype(np.float32)
        at_row, at_column = self._reaching(found, floors, NOTHING)
        score = np.full((len(rows), count), -np.inf, np.float32)
        number = np.full((len(rows), count), NONE)
        _rank(rows, np.asarray(self._exact), at_row, at_column, score, number)
        return score, number

    def reaching(
        self, rows: Floats | torch.Tensor, floors: Floats, others: Floats, best: int | None = None
    ) -> tuple[Ids, Ids]:
        """Positions of row and column (p,) of the scores that reach a floor of either.

        `floors` (n,) are of the first n rows, `others` (m,) of the first m columns, or empty: then
        only the rows' count. `best`: what can't be among so many best of its row may be left out
        as if its floor were higher. In this thread's scratch memory, valid until its next call.
        """
        found = scans.keys(self._scores(rows)[: len(floors)])
        columns = len(others) or self._count
        if best and best <= min(scans.FEW, columns):
            least = scans.scores_of(scans.floors_of_top(found, columns, best))
            floors = np.maximum(floors, least - np.float32(2 * self.slack))
        return self._reaching(found, floors, others)

    def _reaching(self, found: scans.Keys, floors: Floats, others: Floats) -> tuple[Ids, Ids]:
        columns = len(others) or self._count
        shape = (len(found), columns)
        at_row, at_column = (
            buffer(name, shape, torch.int32).numpy().ravel() for name in ("row", "column")
        )
        of_rows, of_columns = (scans.floors_of(some, found.dtype) for some in (floors, others))
        count = scans.reaching(found, columns, of_rows, of_columns, at_row, at_column)
        return at_row[:count], at_column[:count]

    def _scores(self, rows: Floats | torch.Tensor) -> torch.Tensor:
        """(n, m), in bf16 some more that mean nothing; in this thread's scratch memory."""
        left = torch.as_tensor(rows)
        if self._pad:
            left = _padded(left, self._dtype)
            out = buffer("scores", (len(left), len(self._columns)), self._dtype)
            whole = torch.mm(left, self._columns.T, out=out)[: len(rows)]
            return whole if self._bias is None else whole[:, : self._count] + self._bias
        if _mkldnn_linear and len(rows) == TILE_ROWS and self._count:
            out = _mkldnn_linear(left, self._columns, None, "none", [], "")
        else:
            out = buffer("scores", (len(rows), self._count), torch.float32)
            torch.mm(left, self._columns.T, out=out)
        return out if self._bias is None else out.add_(self._bias)


def _padded(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows (n, D) in dtype, and zeros up to a multiple of PAD: oneDNN compiles for every shape."""
    missing = -len(rows) % PAD
    if not missing:
        return rows.to(dtype)
    out = torch.empty(len(rows) + missing, rows.shape[1], dtype=dtype)
    out[: len(rows)] = rows
    out[len(rows) :] = 0
    return out


def gathered(rows: Floats, chosen: Ints) -> Floats:
    """rows[chosen] in this thread's scratch memory, valid until its next call."""
    out: Floats = buffer("rows", (len(chosen), rows.shape[1]), torch.float32).numpy()
    np.take(rows, chosen, axis=0, out=out, mode="clip")
    return out


def rounded(rows: Floats) -> torch.Tensor:
    """Rows (n, D) as products take them fastest: in bf16, or themselves."""
    if fast_dtype() == torch.float32:
        return torch.from_numpy(rows)
    out = torch.empty(rows.shape, dtype=fast_dtype())

    def tile(start: int, stop: int) -> None:
        out[start:stop] = torch.from_numpy(rows[start:stop])

    each_tile(len(rows), SQUARES_TILE, tile)
    return out


def chosen_of(rows: torch.Tensor, chosen: Ints, name: str) -> torch.Tensor:
    """rows[chosen], and some more rows up to a multiple of PAD, in this thread's scratch memory:
    valid until its next call by that name."""
    at = buffer(f"{name} at", (len(chosen) + -len(chosen) % PAD, 1), torch.int64)[:, 0]
    at.numpy()[: len(chosen)] = chosen
    at[len(chosen) :] = 0
    out = buffer(name, (len(at), rows.shape[1]), rows.dtype)
    return torch.index_select(rows, 0, at, out=out)


def as_rows(block: npt.ArrayLike) -> Floats:
    """The block as fp32 rows (n, D). Raises ValueError for another shape."""
    rows = np.ascontiguousarray(block, np.float32)
    if rows.ndim != 2:
        raise ValueError(f"rows must be an array (n, D), got one of shape {rows.shape}")
    return rows


def square_norms(rows: Floats) -> Doubles:
    """The square (n,) of each row's norm."""
    found = np.empty(len(rows))
    each_tile(len(rows), SQUARES_TILE, lambda a, b: _square_norms(a, b, rows, found))
    return found


@numba.njit(nogil=True, cache=True)
def _square_norms(start: int, stop: int, rows: Floats, found: Doubles) -> None:
    for i in range(start, stop):
        found[i] = exact_dot(rows[i], rows[i])


def lost(rows: Floats, dtype: torch.dtype) -> float:
    """The largest norm of what rows (n, D) lose when they are rounded to dtype."""
    if dtype == torch.float32:
        return 0.0
    norms = np.zeros(-(-len(rows) // SQUARES_TILE))

    def tile(start: int, stop: int) -> None:
        exact = torch.from_numpy(rows[start:stop])
        off = exact - exact.to(dtype).float()
        norms[start // SQUARES_TILE] = float(torch.linalg.vector_norm(off, dim=1).max())

    each_tile(len(rows), SQUARES_TILE, tile)
    return float(norms.max(initial=0.0)) * (1 + ROUNDED[torch.float32])


def check_finite(rows: Floats) -> Doubles:
    """The squares (n,) of rows (n, D). Raises ValueError that names those with NaN or infinity."""
    found = square_norms(rows)
    bad = np.flatnonzero(~np.isfinite(found))
    if len(bad):
        shown = ", ".join(map(str, bad[:5]))
        raise ValueError(
            f"{len(bad)} of {len(rows)} vectors are not finite (rows {shown}); leave them out"
        )
    return found


@numba.njit(nogil=True, cache=True, fastmath={"nnan", "nsz", "reassoc", "contract"})
def exact_dot(left: Floats, right: Floats) -> float:
    """left . right, summed in fp64."""
    total = 0.0
    for d in range(left.size):
        total += np.float64(left[d]) * np.float64(right[d])
    return total


@numba.njit(nogil=True, cache=True, fastmath={"nnan", "nsz", "reassoc", "contract"})
def fast_dot(left: Floats, right: Floats) -> np.float32:
    """left . right, summed in fp32."""
    total = np.float32(0.0)
    for d in range(left.size):
        total += left[d] * right[d]
    return total


@numba.njit(nogil=True, cache=True)
def _rank(
    rows: Floats, columns: Floats, at_row: Ids, at_column: Ids, score: Floats, number: Ints
) -> None:
    """The t best (n, t) of the pairs (p,), in order of rows, by their products in fp32, equal ones
    by number."""
    size, filled, before = score.shape[1], 0, -1
    for pair in range(at_row.size):
        i, column = at_row[pair], at_column[pair]
        if i != before:
            filled, before = 0, i
        true, place = fast_dot(rows[i], columns[column]), min(filled, size - 1)
        if filled == size and not precedes(true, column, score[i, place], number[i, place]):
            continue
        while place > 0 and precedes(true, column, score[i, place - 1], number[i, place - 1]):
            score[i, place], number[i, place] = score[i, place - 1], number[i, place - 1]
            place -= 1
        score[i, place], number[i, place] = true, column
        filled = min(filled + 1, size)


@numba.njit(nogil=True, cache=True)
def precedes(score: np.float32, number: int, other_score: np.float32, other_number: int) -> bool:
    """Whether one of two pairs is better: the larger score, of equal ones the smaller number."""
    return bool(score > other_score or (score == other_score and number < other_number))
