"""k nearest neighbours by cosine: exact blocks of products, and an inverted file over one slab.

Rows are unit-norm fp32, so that a product is a cosine. Results are ordered by falling cosine,
ties by rising number. Base numbers are any int64 labels.
"""

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

QUERY_ROWS = 1024  # products are made in blocks of this many queries
NONE = -1  # the number of a neighbour that isn't there


@dataclass
class Neighbours:
    """For each of n queries up to k neighbours: cosines (n, k), numbers (n, k), NONE at the end."""

    cosine: Floats
    number: Ints

    @classmethod
    def empty(cls, queries: int, k: int) -> "Neighbours":
        return cls(np.full((queries, k), -np.inf, np.float32), np.full((queries, k), NONE))

    def merge(self, other: "Neighbours") -> "Neighbours":
        """The best k of both; a number must not be in both."""
        cosine = np.concatenate([self.cosine, other.cosine], axis=1)
        number = np.concatenate([self.number, other.number], axis=1)
        order = np.lexsort((number, -cosine), axis=1)[:, : self.cosine.shape[1]]
        return Neighbours(
            np.take_along_axis(cosine, order, axis=1), np.take_along_axis(number, order, axis=1)
        )


def exact_block(queries: Floats, base: Floats, numbers: Ints, k: int) -> Neighbours:
    """The k nearest of `base` (m, D), labelled `numbers` (m,), for `queries` (n, D)."""
    found = Neighbours.empty(len(queries), k)
    if not len(base):
        return found
    keep = min(k, len(base))
    right = torch.from_numpy(base).T
    for start in range(0, len(queries), QUERY_ROWS):
        block = slice(start, start + QUERY_ROWS)
        cosine, column = torch.topk(torch.from_numpy(queries[block]) @ right, keep, dim=1)
        found.cosine[block, :keep] = cosine.numpy()
        found.number[block, :keep] = numbers[column.numpy()]
    return found.merge(Neighbours.empty(len(queries), 0))


class SlabIndex:
    """An inverted-file index over one slab of the base, with `nprobe` set for a target recall."""

    def __init__(self, base: Floats, numbers: Ints, seed: int) -> None:
        cells = max(1, min(int(4 * np.sqrt(len(base))), len(base) // 10))
        quantizer = faiss.IndexFlatIP(base.shape[1])
        self._index: Any = faiss.IndexIVFFlat(
            quantizer, base.shape[1], cells, faiss.METRIC_INNER_PRODUCT
        )
        self._index.cp.seed = seed & 0x7FFFFFFF
        self._index.cp.min_points_per_centroid = 1
        self._index.train(base)
        self._index.add(base)
        self._base, self._numbers, self.cells = base, numbers, cells

    def tune(self, queries: Floats, k: int, target: float) -> int:
        """Doubles `nprobe` until a sample's recall@k reaches `target`; at all cells it is exact."""
        truth = exact_block(queries, self._base, self._numbers, k)
        probes = 4
        while True:
            self._index.nprobe = min(probes, self.cells)
            if probes >= self.cells or recall(self.search(queries, k), truth) >= target:
                return int(self._index.nprobe)
            probes *= 2

    def search(self, queries: Floats, k: int) -> Neighbours:
        cosine, column = self._index.search(queries, k)
        number = np.where(column >= 0, self._numbers[column], NONE)
        found = Neighbours(np.where(column >= 0, cosine, -np.inf).astype(np.float32), number)
        return found.merge(Neighbours.empty(len(queries), 0))


def recall(found: Neighbours, truth: Neighbours) -> float:
    """The share of true neighbours that were found; a tie counts as found."""
    last = np.where(truth.number == NONE, np.inf, truth.cosine).min(axis=1, keepdims=True)
    wanted = (truth.number != NONE).sum()
    hits = ((found.number != NONE) & (found.cosine >= last - 1e-6)).sum()
    return float(min(hits, wanted) / wanted) if wanted else 1.0
