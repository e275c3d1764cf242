"""In which order samples are seen: pure NumPy, a function of (seed, epoch, position) alone.

Position p = 0, 1, 2, … counts all samples of a run, over all ranks and epochs: epoch p // N shows
each of the N samples once. Which rank or worker takes a position is not asked here, so that a run
goes on at the exact sample with another number of them.

The shuffle is made of hashes and a stable sort rather than of a library's generator, whose streams
may change with its version: a run can be resumed years later.
"""

import hashlib
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from pretrain.samples import Ints

Words = NDArray[np.uint64]
KEPT_WINDOWS = 2  # a batch may lie across a border
_SHARDS, _SAMPLES, _REPLACEMENTS, _AUGMENTATION = range(4)  # streams of hashes


def hashes(seed: int, stream: int, *parts: int, count: int) -> Words:
    """(count,) pseudo-random words: splitmix64 over a counter that begins at a hash of the rest."""
    text = ",".join(map(str, (seed, stream, *parts)))
    begin = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.uint64)
    words = begin + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = words ^ (words >> np.uint64(31))
    return mixed


def shuffled(seed: int, stream: int, *parts: int, count: int) -> Ints:
    """A uniform permutation of 0 … count - 1."""
    return np.argsort(hashes(seed, stream, *parts, count=count), kind="stable")


def augmentation_rng(seed: int, position: int) -> np.random.Generator:
    """The randomness of the sample at `position`, whoever augments it."""
    return np.random.Generator(np.random.Philox(key=hashes(seed, _AUGMENTATION, position, count=2)))


class Order:
    """Positions -> sample numbers, for shards of `counts` samples each.

    Every epoch puts the shards in a new order, cuts it in windows of whole shards of about
    `window` samples, and permutes the samples of a window uniformly: O(window + shards) memory, and
    only a window's shards are read at a time. Up to `window` samples in all, an epoch is one
    uniform permutation. Beyond that, two samples of one shard are always seen within a window of
    each other: as good as uniform for shards that hold a random share of the data (those of
    `curate` do), not for shards sorted by class.
    """

    def __init__(self, counts: Ints, seed: int, window: int) -> None:
        self._counts, self._seed, self._window = counts, seed, window
        self._starts = np.cumsum(counts) - counts  # sample number of each shard's first
        self.samples_per_epoch = int(counts.sum())
        self._epoch = -1
        self._windows: OrderedDict[tuple[int, int], Ints] = OrderedDict()

    def samples(self, start: int, stop: int) -> Ints:
        """(stop - start,) sample numbers of the positions from `start` to before `stop`."""
        parts = []
        while start < stop:
            epoch, place = divmod(start, self.samples_per_epoch)
            self._enter(epoch)
            window = int(np.searchsorted(self._borders, place, "right")) - 1
            permuted = self._permuted(window)
            begin = place - int(self._borders[window])
            parts.append(permuted[begin : begin + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def replacement(self, position: int, attempt: int) -> int:
        """The sample to show at `position` when the one before in line can't be decoded.

        Drawn from the whole epoch, not the neighbour, which would be in the same batch twice.
        """
        drawn = hashes(self._seed, _REPLACEMENTS, position, attempt, count=1)[0]
        return int(drawn % np.uint64(self.samples_per_epoch))

    def _enter(self, epoch: int) -> None:
        """Lays out the windows of an epoch: places of first samples, and of first shards."""
        if epoch == self._epoch:
            return
        self._shards = shuffled(self._seed, _SHARDS, epoch, count=len(self._counts))
        ends = np.cumsum(self._counts[self._shards])
        starts = ends - self._counts[self._shards]
        self._firsts = np.flatnonzero(np.diff(starts // self._window, prepend=-1))
        self._borders = starts[self._firsts]
        self._epoch = epoch

    def _permuted(self, window: int) -> Ints:
        """(samples of the window,) their numbers in the order in which they are seen."""
        key = (self._epoch, window)
        if key not in self._windows:
            first = self._firsts[window]
            last = self._firsts[window + 1] if window + 1 < len(self._firsts) else None
            shards = self._shards[first:last]
            counts = self._counts[shards]
            total = int(counts.sum())
            # Sample numbers of the shards one after the other.
            shift = np.repeat(self._starts[shards] - (np.cumsum(counts) - counts), counts)
            samples = np.arange(total) + shift
            self._windows[key] = samples[shuffled(self._seed, _SAMPLES, *key, count=total)]
            if len(self._windows) > KEPT_WINDOWS:
                self._windows.popitem(last=False)
        return self._windows[key]
