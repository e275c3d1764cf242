"""What a data set is to the sample stream, whether tar shards or a folder of images."""

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Sample(NamedTuple):
    """One image's original bytes, and where they were found."""

    shard: str
    key: str
    data: bytes


class Source(Protocol):
    """Images numbered 0 to N - 1 in the order of the shards; may be read by several threads.

    `fingerprint` changes with the images or their order; `remote` sources answer slowly, so that
    many reads should be under way at once.
    """

    uri: str
    remote: bool
    counts: Ints  # (shards,) images of each
    fingerprint: str

    def read(self, sample: int) -> Sample: ...
