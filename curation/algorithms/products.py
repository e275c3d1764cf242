"""Blocks of products, and what k-means asks of them; searches have `ranking` and `coarse`."""

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

SQUARES_TILE = 8192
TILE_ROWS = 1024  # what fits a core's cache with its scores
PAD = 64

NONE = scans.NONE

# fp32 by oneDNN, for tiles of one shape: torch.mm asks MKL, which is half as fast on processors of
# other makers, for which it doesn't use AVX-512.
_mkldnn_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def fast_dtype() -> torch.dtype:
    """bf16 where the processor multiplies matrices of it faster, else fp32.

    That is on those with AMX or AVX-512 BF16.
    """
    faster = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if faster else torch.float32


def multiplies_bytes() -> bool:
    """Whether the processor multiplies int8 fastest, and sums without overflow."""
    return torch.cpu._is_vnni_supported()


class Products:
    """Scores of rows against fixed `columns` (m, D): row . column + bias."""

    tile_rows = TILE_ROWS  # how many are best given at a time

    def __init__(
        self, columns: Floats, bias: Floats | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self._dtype, self._count = dtype or fast_dtype(), len(columns)
        self._columns = torch.from_numpy(columns)
        if self._dtype != torch.float32:
            self._columns = padded(self._columns, self._dtype)
        none = bias is None or not bias.any()
        self._bias = None if none else torch.from_numpy(bias)

    def scores(self, rows: Floats) -> Floats:
        """(n, m) scores of rows (n, D) in fp32: good until this thread's next call."""
        scores: Floats = self._scores(rows)[:, : self._count].float().numpy(force=True)
        return scores

    def top(self, rows: Floats, count: int) -> tuple[Floats, Ids]:
        """The min(count, m) largest scores of rows (n, D), falling, and their columns: (n, t)."""
        found = scans.keys(self._scores(rows))
        best, at = scans.top(found, self._count, min(count, self._count))
        return scans.scores_of(best), at

    def reaching(self, rows: Floats, floors: Floats) -> tuple[Ids, Ids]:
        """Positions of row and column (p,) of the scores that reach a floor of their row (n,)."""
        found = scans.keys(self._scores(rows)[: len(floors)])
        nothing = np.empty(0, found.dtype)
        return reached(found, self._count, scans.floors_of(floors, found.dtype), nothing)

    def _scores(self, rows: Floats) -> torch.Tensor:
        """(n, m), in bf16 some more that mean nothing; in this thread's scratch memory."""
        left = torch.from_numpy(rows)
        if self._dtype == torch.float32:
            out = multiplied(left, self._columns)
            return out if self._bias is None else out.add_(self._bias)
        whole = multiplied(padded(left, self._dtype), self._columns)[: len(rows)]
        return whole if self._bias is None else whole[:, : self._count] + self._bias


def reached(
    found: scans.Keys, columns: int, floors: scans.Keys, others: scans.Keys
) -> tuple[Ids, Ids]:
    """Positions of row and column (p,) of the keys that reach a floor of the rows (n,) or of the
    columns (m,), of which there may be none: in this thread's scratch memory, valid until its next
    call."""
    shape = len(found), columns
    at_row, at_column = (
        buffer(name, shape, torch.int32).numpy().ravel() for name in ("row", "column")
    )
    count = scans.reaching(found, columns, floors, others, at_row, at_column)
    return at_row[:count], at_column[:count]


def multiplied(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Products (n, m) of rows (n, D) and (m, D), of int8 in int32, in this thread's scratch memory:
    valid until its next call."""
    if left.dtype == torch.float32 and _mkldnn_linear and len(left) == TILE_ROWS and len(right):
        here: torch.Tensor = _mkldnn_linear(left, right, None, "none", [], "")
        return here
    # torch gets products of single int8 wrong
    if left.dtype == torch.int8 and (left.shape[1] == 1 or not multiplies_bytes()):
        sums = buffer("sums", (len(left), len(right)), torch.float32)
        torch.mm(left.float(), right.float().T, out=sums)  # exact below 2^24
        return buffer("scores", (len(left), len(right)), torch.int32).copy_(sums)
    kind = torch.int32 if left.dtype == torch.int8 else left.dtype
    out = buffer("scores", (len(left), len(right)), kind)
    multiply: Any = torch._int_mm if left.dtype == torch.int8 else torch.mm
    multiply(left, right.T, out=out)
    return out


def padded(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
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
def precedes(score: np.float32, number: int, other_score: np.float32, other_number: int) -> bool:
    """Whether one of two pairs is better: the larger score, of equal ones the smaller number."""
    return bool(score > other_score or (score == other_score and number < other_number))
