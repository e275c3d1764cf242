"""Perceptual hashes as descriptors for benchmarks/copies.py: rows whose cosines tell their bits."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from curation.images.perceptual import phash

Rows = NDArray[np.float32]
Plane = NDArray[np.float64]


def rows_of_bits(bits: NDArray[np.bool_]) -> Rows:
    """(n, b) bits as unit rows: a Hamming distance of d is a cosine of 1 - 2 d / b."""
    return np.where(bits, 1, -1).astype(np.float32) / np.float32(np.sqrt(bits.shape[1]))


def cosines(bits: int, distances: Sequence[int]) -> dict[str, float]:
    """The least cosine at each distance, by its name."""
    return {f"{apart} bits": 1 - 2 * apart / bits - 1e-5 for apart in distances}


class PHash:
    """The recipe's `safety.phash`."""

    name = "pHash"

    def __init__(self) -> None:
        self.thresholds = cosines(64, (0, 2, 4, 6, 8, 10, 14))

    def rows(self, images: Sequence[Image.Image]) -> Rows:
        found = [phash(image) for image in images]
        hashes = np.array([hash_ or 0 for hash_ in found], ">u8")
        rows = rows_of_bits(np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1) > 0)
        rows[[hash_ is None for hash_ in found]] = 0  # near nothing
        return rows


class PDQ:
    """PDQ (Facebook 2019): like pHash, of 64 x 64 smoothed levels and 16 x 16 frequencies.

    Smoothed twice by a box of 1/128 of each side, without the constant. The bits are those of
    `pdqhash` 0.2.8, in another order; its `quality`, which tells images of one colour, is left out.
    """

    name = "PDQ"
    _side, _low = 64, 16

    def __init__(self) -> None:
        self.thresholds = cosines(256, (8, 16, 31, 48, 64))
        place, low = np.arange(self._side), np.arange(1, self._low + 1)
        self._dct = np.cos(np.pi / self._side * (place[None, :] + 0.5) * low[:, None])  # (16, 64)

    def rows(self, images: Sequence[Image.Image]) -> Rows:
        return rows_of_bits(np.stack([self._bits(image) for image in images]))

    def _bits(self, image: Image.Image) -> NDArray[np.bool_]:
        luma = np.asarray(image, np.float64) @ np.array([0.299, 0.587, 0.114])
        for _ in range(2):
            luma = _box(_box(luma.T).T)
        rows, columns = (
            ((np.arange(self._side) + 0.5) * side / self._side).astype(int) for side in luma.shape
        )
        low = (self._dct @ luma[np.ix_(rows, columns)] @ self._dct.T).ravel()
        above: NDArray[np.bool_] = low > np.median(low)
        return above


def _box(plane: Plane) -> Plane:
    """The mean over a window along the columns (n, m), smaller at the edges."""
    side = len(plane)
    window = -(-side // (2 * PDQ._side))
    after = window // 2 + 1
    at = np.arange(side)
    start, stop = np.maximum(at + after - window, 0), np.minimum(at + after, side)
    sums = np.vstack([np.zeros(plane.shape[1]), np.cumsum(plane, axis=0)])
    means: NDArray[np.float64] = (sums[stop] - sums[start]) / (stop - start)[:, None]
    return means
