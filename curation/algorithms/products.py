"""Blocks of products in one thread or several: what k-means and the kNN join are made of.

Work is cut in tiles that don't depend on the number of threads, so results don't either.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

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
DEVICE_SCORES = 1 << 26  # of a tile on a GPU: 0.6 GB with what they are made from
INSERTED = 128  # up to so many of the largest are found by insertion
PAD = 64
CHUNK = 32  # scores whose largest is looked at before any of them

_scratch = threading.local()

# fp32 by oneDNN, for tiles of one shape: torch.mm asks MKL, which is half as fast on processors of
# other makers, for which it doesn't use AVX-512.
_mkldnn_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def fast_dtype() -> torch.dtype:
    """bf16 where matrices of it are multiplied faster, else fp32.

    That is on GPUs since Ampere and on processors with AMX or AVX-512 BF16.
    """
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32
    faster = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if faster else torch.float32


def fast_device() -> torch.device | None:
    """The GPU that products are computed on; None: this processor, and numba looks through them."""
    return torch.device("cuda") if torch.cuda.is_available() else None


class Products:
    """Scores of rows against fixed `columns` (m, D): row . column + bias, in fp32.

    `slack` bounds what a score can be off for rows of norm 1. On a GPU the scores stay there, and
    only what was asked for comes back.
    """

    def __init__(
        self, columns: Floats, bias: Floats | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self._device = fast_device()
        self._dtype = dtype or fast_dtype()
        self._count, self._pad = len(columns), self._device is None and self._dtype != torch.float32
        self._columns = torch.from_numpy(columns).to(self._device, self._dtype)
        if self._pad:
            self._columns = _padded(self._columns, self._dtype)
        none = bias is None or not bias.any()
        self._bias = None if none else torch.from_numpy(bias).to(self._device)
        longest = float(np.sqrt(np.einsum("md,md->m", columns, columns).max(initial=0.0)))
        self.slack = SLACK[self._dtype] * longest

    @property
    def tile_rows(self) -> int:
        """How many rows are best given at a time."""
        if self._device is None:
            return TILE_ROWS
        return max(1, DEVICE_SCORES // self._count)

    def scores(self, rows: Floats) -> Floats:
        """(n, m) scores of rows (n, D): this thread's scratch memory, valid until its next call."""
        scores: Floats = self._scores(rows).numpy(force=True)
        return scores

    def top(self, rows: Floats, count: int) -> tuple[Floats, Ids]:
        """The min(count, m) largest scores of rows (n, D), falling, and their columns: (n, t)."""
        count, scores = min(count, self._count), self._scores(rows)
        if self._device is None and count <= INSERTED:
            best = np.empty((len(rows), count), np.float32)
            at = np.empty((len(rows), count), np.int32)
            _top(scores.numpy(), best, at)
            return best, at
        largest, places = scores.topk(count, dim=1)
        return largest.numpy(force=True), places.to(torch.int32).numpy(force=True)

    def reaching(self, rows: Floats, floors: Floats, others: Floats) -> tuple[Ids, Ids]:
        """Positions of row and column (p,) of the scores that reach a floor of either.

        `floors` (n,) are of the rows, `others` (m,) of the columns, or empty: then only the rows'
        count. In this thread's scratch memory, valid until its next call.
        """
        scores = self._scores(rows)
        if self._device is None:
            shape = (scores.shape[0], scores.shape[1])
            found = _buffer("row", shape, torch.int32).numpy().ravel()
            columns = _buffer("column", shape, torch.int32).numpy().ravel()
            count = _reaching(scores.numpy(), floors, others, found, columns)
            return found[:count], columns[:count]
        reached = scores >= torch.from_numpy(floors).to(self._device)[:, None]
        if len(others):
            reached |= scores >= torch.from_numpy(others).to(self._device)
        row, column = reached.nonzero(as_tuple=True)
        as_ids = (one.to(torch.int32).numpy(force=True) for one in (row, column))
        return next(as_ids), next(as_ids)

    def _scores(self, rows: Floats) -> torch.Tensor:
        left = torch.from_numpy(rows).to(self._device)
        if self._device is not None:
            scores = (left.to(self._dtype) @ self._columns.T).float()
            return scores if self._bias is None else scores + self._bias
        out = _buffer("scores", (len(rows), self._count), torch.float32)
        if self._pad:
            whole = torch.mm(_padded(left, self._dtype), self._columns.T)
            out.copy_(whole[: len(rows), : self._count])
        elif _mkldnn_linear and len(rows) == TILE_ROWS and self._count:
            out = _mkldnn_linear(left, self._columns, None, "none", [], "")
        else:
            torch.mm(left, self._columns.T, out=out)
        if self._bias is not None:
            out += self._bias
        return out


def _padded(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows (n, D) in dtype, and zeros up to a multiple of PAD: oneDNN compiles for every shape."""
    missing = -len(rows) % PAD
    if not missing:
        return rows.to(dtype)
    out = torch.empty(len(rows) + missing, rows.shape[1], dtype=dtype)
    out[: len(rows)] = rows
    out[len(rows) :] = 0
    return out


def _buffer(name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Memory that a thread uses again: fresh pages for every tile would cost more than the sums."""
    have = getattr(_scratch, name, None)
    if have is None or have.numel() < shape[0] * shape[1]:
        have = torch.empty(shape[0] * shape[1], dtype=dtype)
        setattr(_scratch, name, have)
    flat: torch.Tensor = have
    return flat[: shape[0] * shape[1]].view(shape)


def gathered(rows: Floats, chosen: Ints, name: str = "rows") -> Floats:
    """rows[chosen] in this thread's scratch memory, valid until its next call by that name."""
    out: Floats = _buffer(name, (len(chosen), rows.shape[1]), torch.float32).numpy()
    np.take(rows, chosen, axis=0, out=out, mode="clip")
    return out


def each_tile(count: int, tile: int, work: Callable[[int, int], None]) -> None:
    """work(start, stop) for consecutive tiles of 0 .. count, on as many threads as torch has."""
    spans = [(start, min(start + tile, count)) for start in range(0, count, tile)]
    each(len(spans), lambda number: work(*spans[number]))


def each(count: int, work: Callable[[int], None]) -> None:
    """work(i) for 0 .. count - 1 on as many threads as torch has, each product by one of them."""
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        for number in range(count):
            work(number)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in _pool(threads).map(work, range(count)):
            pass
    finally:
        torch.set_num_threads(before)


def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept by whoever calls: k-means asks for threads a hundred times an iteration.

    A forked child has another id, and none of its parent's threads.
    """
    kept_for = threads, threading.get_native_id()
    if getattr(_scratch, "pool_kept_for", None) != kept_for:
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        _scratch.pool_kept_for, _scratch.pool = kept_for, pool
    kept: ThreadPoolExecutor = _scratch.pool
    return kept


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
def _insert(score: float, column: int, best: Floats, at: Ids, filled: int) -> int:
    place = min(filled, best.size - 1)
    while place > 0 and best[place - 1] < score:
        best[place], at[place] = best[place - 1], at[place - 1]
        place -= 1
    best[place], at[place] = score, column
    return min(filled + 1, best.size)


@numba.njit(nogil=True, cache=True, fastmath={"nnan", "nsz", "reassoc"})
def top_of_row(scores: Floats, best: Floats, at: Ids) -> int:
    """Writes the largest scores of one row (m,) into `best` (t,) and `at` (t,), falling.

    Equal scores keep the order of their columns. Returns how many there were, at most t.
    """
    size, filled = best.size, 0
    chunks = scores.size // CHUNK
    floor = np.float32(-np.inf)
    if chunks > size:  # the t-th largest of the chunks' largest: t scores are not below it
        peaks = np.empty(chunks, np.float32)
        for c in range(chunks):
            peak = scores[c * CHUNK]
            for j in range(c * CHUNK, (c + 1) * CHUNK):
                peak = max(peak, scores[j])
            peaks[c] = peak
            if filled < size or peak > best[size - 1]:
                filled = _insert(peak, c, best, at, filled)
        floor, filled = best[size - 1], 0
        for c in range(chunks):
            if peaks[c] >= floor:
                for j in range(c * CHUNK, (c + 1) * CHUNK):
                    if scores[j] >= floor and (filled < size or scores[j] > best[size - 1]):
                        filled = _insert(scores[j], j, best, at, filled)
    for j in range(chunks * CHUNK if chunks > size else 0, scores.size):
        if scores[j] >= floor and (filled < size or scores[j] > best[size - 1]):
            filled = _insert(scores[j], j, best, at, filled)
    return filled


@numba.njit(nogil=True, cache=True, fastmath={"nnan", "nsz", "reassoc"})
def _reaching(scores: Floats, floors: Floats, others: Floats, at_row: Ids, at_column: Ids) -> int:
    """Writes down where scores (n, m) reach a floor; returns how many there are."""
    count, columns = 0, scores.shape[1]
    lowest = np.float32(np.inf)
    for j in range(others.size):
        lowest = min(lowest, others[j])
    for i in range(scores.shape[0]):
        floor = min(floors[i], lowest)
        for start in range(0, columns, CHUNK):
            stop = min(start + CHUNK, columns)
            largest = scores[i, start]
            for j in range(start, stop):
                largest = max(largest, scores[i, j])
            if largest < floor:
                continue
            for j in range(start, stop):
                if scores[i, j] >= floors[i] or (others.size and scores[i, j] >= others[j]):
                    at_row[count], at_column[count] = i, j
                    count += 1
    return count


@numba.njit(nogil=True, cache=True)
def _top(scores: Floats, best: Floats, at: Ids) -> None:
    for i in range(scores.shape[0]):
        top_of_row(scores[i], best[i], at[i])
