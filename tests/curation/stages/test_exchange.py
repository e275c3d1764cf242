"""Rows from one worker to many: all arrive, in order, and a receiver reads little but its own."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation.runtime.store import FileStore
from curation.stages.cluster_tables import binary
from curation.stages.exchange import receive, receive_each, send


class Counting(FileStore):
    """Counts the bytes that are read."""

    read_bytes = 0

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        data = super().read(path, start, length)
        self.read_bytes += len(data)
        return data


def rows(count: int, rng: np.random.Generator) -> pa.Table:
    vectors = binary(rng.integers(0, 255, (count, 512), dtype=np.uint8))
    lists = pa.array([list(range(n % 3)) for n in range(count)], pa.list_(pa.int32()))
    return pa.table({"image": np.arange(count), "vector": vectors, "cells": lists})


@pytest.mark.parametrize(("count", "receivers"), [(0, 3), (1, 1), (500, 7), (40, 900)])
def test_every_row_arrives_where_it_was_sent(tmp_path: Path, count: int, receivers: int) -> None:
    rng, store = np.random.default_rng(count), FileStore(str(tmp_path))
    sent = {f"{name}.blocks": rows(count, rng) for name in "ab"}
    to = {path: rng.integers(0, receivers, count) for path in sent}
    for path, table in sent.items():
        send(store, path, table, to[path], receivers)
    for receiver in range(receivers):
        got = pa.concat_tables(receive_each(store, list(sent), receiver, ahead=2))
        mine = [table.filter(pa.array(to[path] == receiver)) for path, table in sent.items()]
        assert got.equals(pa.concat_tables(mine))


def test_a_receiver_reads_little_but_its_own_rows(tmp_path: Path) -> None:
    store = Counting(str(tmp_path))
    table = rows(6000, np.random.default_rng(0))
    send(store, "x.blocks", table, np.arange(6000) % 3000, 3000)
    assert len(receive(store, 1234, "x.blocks")) == 2
    assert store.read_bytes < 2 * 512 + 2000
