"""IVF-PQ: the k nearest of a slab by short codes, re-scored exactly, as the DINOv2 paper searches.

Jégou, Douze and Schmid (PAMI 2011) by faiss: rows lie in inverted lists and are compared by 4-bit
codes of every 4 components (fast scan, a register holds a table). What that puts first is scored
again with the rows. Quantizers are trained once; slabs of the base are then searched one by one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import faiss
import numba
import numpy as np
import torch

from curation.algorithms.assign import assign
from curation.algorithms.best import Best, Neighbours, offer
from curation.algorithms.kmeans import fit
from curation.algorithms.knn import RecallError, Search, exact, recall
from curation.algorithms.products import Floats, Ints, check_finite, fast_dot
from curation.algorithms.tiles import each_tile
from curation.algorithms.visits import Rows

BITS = 4
WIDTH = 4  # components a code
TRAINING_ROWS = 39  # for each centroid of a quantizer at least, says faiss
ITERATIONS = 10
MARGIN = 0.1  # of what is left above the target recall: a sample errs
FACTORS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # candidates for each neighbour
SAMPLE_QUERIES = 256
TILE_QUERIES = 256


class IvfPq:
    """Trained on a sample of the base: unit rows (n, D). Few rows are no base for it, see `lists`.

    `lists`: how many inverted lists were trained, of `lists` wanted as many as the sample has rows
    for. 0 when it hasn't enough for the codes: all is searched exactly then.
    Raises ValueError for rows that aren't finite or not of unit norm; zeros are left out.
    """

    def __init__(
        self, sample: Floats, lists: int = 1024, target_recall: float = 0.99, seed: int = 0
    ) -> None:
        sample = np.ascontiguousarray(sample, np.float32)
        check_finite(sample)
        sample = sample[sample.any(axis=1)]
        self._target, self._seed = target_recall, seed
        enough = len(sample) >= TRAINING_ROWS << BITS
        self.lists = max(1, min(lists, len(sample) // TRAINING_ROWS)) if enough else 0
        if not self.lists:
            return
        rng = np.random.default_rng(seed)
        self._centroids = fit(sample, self.lists, ITERATIONS, rng).centroids
        wide = _padded(self._centroids)
        self._quantizer = faiss.IndexFlatIP(wide.shape[1])
        self._quantizer.add(wide)
        codes = wide.shape[1] // WIDTH
        metric = faiss.METRIC_INNER_PRODUCT
        shape = (wide.shape[1], self.lists, codes, BITS, metric)
        self._trained = faiss.IndexIVFPQ(self._quantizer, *shape)
        with _faiss_threads(1):  # what it sums in parallel may depend on how many do
            self._trained.train(_padded(sample))

    def search(self, rows: Floats, numbers: Ints, queries: Floats, k: int) -> Neighbours:
        """The k nearest of `rows` (m, D), which have `numbers` (m,), for queries (n, D).

        How many lists and candidates are looked at is measured on a sample of the queries.
        Errors: ValueError for rows that aren't finite, RecallError.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        check_finite(queries)
        telling = np.flatnonzero(queries.any(axis=1))
        rng = np.random.default_rng([self._seed, 1])  # not the draws that the lists began with
        drawn = rng.choice(telling, min(SAMPLE_QUERIES, len(telling)), replace=False)
        return self.over(rows, numbers, queries[np.sort(drawn)], k).search(queries)

    def over(self, rows: Floats, numbers: Ints, sample: Floats, k: int) -> "Slab":
        """An index of `rows` (m, D), tuned for the target recall of a few queries (s, D).

        Held: the rows, and D / 8 + 8 bytes a row, twice while the index is built.
        Errors: ValueError for rows that aren't finite, RecallError.
        """
        rows = np.ascontiguousarray(rows, np.float32)
        check_finite(rows)
        base = Rows(rows, numbers)
        if not self.lists or len(rows) < TRAINING_ROWS << BITS or not len(sample):
            return Slab(None, base, k)
        slab = Slab(self._index(rows), base, k)
        self._tune(slab, sample, exact(_unnumbered(sample), [base], Search(k)))
        return slab

    def _index(self, rows: Floats) -> Any:
        """The rows in lists: those of their exactly nearest centroids."""
        cell, _ = assign(rows, self._centroids)
        filled: Any = faiss.clone_index(self._trained)
        wide = _padded(rows)
        with _faiss_threads(torch.get_num_threads()):
            ids = np.arange(len(rows))
            pointers = (faiss.swig_ptr(one) for one in (wide, ids, cell))
            filled.add_core(len(rows), *pointers)
            return faiss.IndexIVFPQFastScan(filled)

    def _tune(self, slab: "Slab", sample: Floats, truth: Neighbours) -> None:
        """Sets how many lists, and candidates a neighbour: of each the smallest that does."""
        aim = self._target + MARGIN * (1 - self._target)

        def measured(nprobe: int, factor: int) -> float:
            slab.nprobe, slab.factor = nprobe, factor
            return recall(slab.search(sample), truth)

        nprobe = 1
        while (reached := measured(nprobe, FACTORS[-1])) < aim and nprobe < self.lists:
            nprobe = min(2 * nprobe, self.lists)
        if reached < self._target:
            raise RecallError(
                f"recall {reached:.4f} on a sample with all {self.lists} lists and"
                f" {FACTORS[-1]} candidates a neighbour, below {self._target}"
            )
        next(factor for factor in FACTORS if measured(nprobe, factor) >= min(aim, reached))


class Slab:
    """An index of some rows with their numbers; none where comparing all is as good."""

    def __init__(self, index: Any, base: Rows, k: int) -> None:
        self._index, self._base, self._k = index, base, k
        self.nprobe, self.factor = 1, FACTORS[0]

    def search(self, queries: Floats) -> Neighbours:
        """The k nearest for queries (n, D).

        Held meanwhile for each thread: 256 queries' candidates, at most 256 k of 12 bytes each.
        """
        if not len(self._base) or self._index is None:
            return exact(_unnumbered(queries), [self._base], Search(self._k))
        best = Best(len(queries), self._k)
        wide, count = _padded(queries), min(self._k * self.factor, len(self._base))
        how: Any = faiss.SearchParametersIVF()
        how.nprobe = self.nprobe

        def tile(start: int, stop: int) -> None:
            with _faiss_threads(1):
                _, at = self._index.search(wide[start:stop], count, params=how)
            state = (best.score[start:stop], best.number[start:stop])
            _rescore(queries[start:stop], self._base.vectors, self._base.numbers, at, *state)

        each_tile(len(queries), TILE_QUERIES, tile)
        found = best.sorted()
        zero = np.flatnonzero(~queries.any(axis=1))  # faiss has no table for them
        if len(zero):
            tied = exact(_unnumbered(queries[zero]), [self._base], Search(self._k))
            found.score[zero], found.number[zero] = tied.score, tied.number
        return found


@contextmanager
def _faiss_threads(count: int) -> Iterator[None]:
    """How many threads faiss uses for what this thread asks."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _unnumbered(queries: Floats) -> Rows:
    return Rows(queries, np.empty(0, np.int64))


def _padded(rows: Floats) -> Floats:
    """Rows (n, D) with zeros up to whole codes: products stay what they are."""
    missing = -rows.shape[1] % WIDTH
    return np.pad(rows, ((0, 0), (0, missing))) if missing else rows


@numba.njit(nogil=True, cache=True)
def _rescore(
    queries: Floats, rows: Floats, numbers: Ints, at: Ints, score: Floats, number: Ints
) -> None:
    """Offers the candidates `at` (n, c), -1 for none, to the heaps (n, k)."""
    for i in range(at.shape[0]):
        for slot in range(at.shape[1]):
            j = at[i, slot]
            if j >= 0:
                offer(score[i], number[i], fast_dot(queries[i], rows[j]), numbers[j], False)
