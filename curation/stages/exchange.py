"""Rows on their way from many workers to many others: one file a sender, a row group a receiver.

Files are as many as senders, however many receivers there are, and a receiver reads its own rows.
"""

import itertools

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curation.runtime.store import Store, compression

Ints = npt.NDArray[np.int64]


def send(store: Store, path: str, table: pa.Table, to: Ints, receivers: int) -> None:
    """Publishes rows (n) for the receivers `to` (n,) of 0 .. receivers - 1."""
    order = np.argsort(to, kind="stable")
    starts = np.searchsorted(to[order], np.arange(receivers + 1))
    table = table.take(pa.array(order))
    with (
        store.publish(path) as scratch,
        pq.ParquetWriter(
            scratch, table.schema, compression=compression(table.schema), use_dictionary=False
        ) as file,
    ):
        for start, stop in itertools.pairwise(starts):
            rows = table.slice(start, stop - start)
            file.write_table(rows, row_group_size=max(1, stop - start))


def receive(store: Store, path: str, receiver: int) -> pa.Table:
    """One receiver's rows of one sender's file."""
    with store.open(path) as file:
        return pq.ParquetFile(file).read_row_group(receiver)
