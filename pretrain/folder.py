"""A folder of image files, at any depth, as a source of samples."""

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from pretrain.samples import Sample
from pretrain.storage import Storage

FILES_A_SHARD = 1_000  # neighbours in the sorted listing, which are shuffled together


class ImageFolder:
    """Image files in the order of their names.

    Names are kept as one block of bytes: ImageNet's would take 150 MB as Python strings, and
    counting references to them would copy their pages in every worker.
    """

    def __init__(self, storage: Storage, names: Sequence[str]) -> None:
        self.uri, self.remote = storage.uri, storage.remote
        self._storage = storage
        encoded = sorted(os.fsencode(name) for name in names)
        self._names = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        shards = -(-len(encoded) // FILES_A_SHARD)
        self.counts = np.full(shards, FILES_A_SHARD, np.int64)
        self.counts[-1] = len(encoded) - (shards - 1) * FILES_A_SHARD
        self.fingerprint = hashlib.sha256(self._names + self._ends.tobytes()).hexdigest()[:16]

    def read(self, sample: int) -> Sample:
        """The bytes of a file; its key is its name below the folder. Errors: UserError."""
        start = int(self._ends[sample - 1]) if sample else 0
        name = os.fsdecode(self._names[start : int(self._ends[sample])])
        return Sample(self.uri, name, self._storage.read(name))
