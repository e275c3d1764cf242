"""Rows on their way from many workers to many others: one file a sender, a block a receiver.

Files are as many as senders, however many receivers there are, and a receiver reads its own rows.
A file is the places of its blocks (receivers + 1 little-endian uint64) and the blocks, each an
Arrow stream: two small reads for a block. Parquet's footer tells of all row groups whoever reads
one: 10 MB with 4,578 receivers of vectors.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.runtime.store import REQUESTS, Store
from curation.stages.tables import overlapped

Ints = npt.NDArray[np.int64]
PLACE = np.dtype("<u8")


def send(store: Store, path: str, table: pa.Table, to: Ints, receivers: int) -> None:
    """Publishes rows (n) for the receivers `to` (n,) of 0 .. receivers - 1."""
    order = np.argsort(to, kind="stable")
    starts = np.searchsorted(to[order], np.arange(receivers + 1))
    table = table.take(pa.array(order)).combine_chunks()
    places = np.zeros(receivers + 1, PLACE)
    places[0] = places.nbytes
    with store.publish(path) as scratch, open(scratch, "wb") as file:
        file.write(places.tobytes())
        for receiver, (start, stop) in enumerate(itertools.pairwise(starts)):
            with pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table.slice(start, stop - start))
            places[receiver + 1] = file.tell()
        file.seek(0)
        file.write(places.tobytes())


def receive(store: Store, receiver: int, path: str) -> pa.Table:
    """One receiver's rows of one sender's file."""
    place = store.read(path, PLACE.itemsize * receiver, 2 * PLACE.itemsize)
    start, stop = np.frombuffer(place, PLACE).tolist()
    return pa.ipc.open_stream(store.read(path, start, stop - start)).read_all()


def receive_each(
    store: Store, paths: Sequence[str], receiver: int, ahead: int = REQUESTS
) -> Iterator[pa.Table]:
    """One receiver's rows of every sender's file, in order; the next `ahead` are being read."""
    for _, table in overlapped(paths, partial(receive, store, receiver), ahead):
        yield table
