"""Centroids -> the rows of the sample that are nearest to each, to fit the next round on.

Vo et al. (arXiv 2405.15613, algorithm 1): k-means puts centroids where rows are dense; fitted again
on equally many rows of each cluster it spreads them over the support. Each round takes from the
whole sample: half of the mean cluster's size from each cluster, or all that it has.

`cluster/fit/001/near/*`         the cluster of each row of a slice, and the cosine to its centroid
`cluster/fit/001/limits.parquet` how far from its centroid each cluster's rows are taken
`cluster/fit/001/sample/*`       those that are: the sample of round 1

Exactly the nearest (`nearest.limits`), of equal ones the first: whoever does it, in any order.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.algorithms.assign import scores_of
from curation.algorithms.hierarchy import rows_to_keep
from curation.algorithms.nearest import keys, limits
from curation.algorithms.products import Floats, Ids, Ints
from curation.runtime.executor import Counts, Item
from curation.runtime.store import Store, open_store, read_table, write_table
from curation.stages.cluster_tables import (
    ClusterConfig,
    Fitting,
    Nearest,
    Slice,
    read_centroids,
    round_folder,
    sample_folder,
    slice_path,
    slice_table,
)
from curation.stages.tables import column_numpy


def resample(
    fitting: Fitting, number: int, path: str, drawn: list[Slice], held: Sequence[Floats]
) -> list[Slice]:
    """The sample of round `number`, published, for the centroids at `path` of the round before.

    `drawn` is the whole sample, with its rows in `held` where this process holds them (else none).
    """
    cfg, store = fitting.cfg, fitting.store
    near = [Item(_near_path(number, one), one.rows, one) for one in drawn]
    fitting.publish(near, partial(NearWorker, cfg, store.uri, number, path, held))
    if not store.exists(_limits_path(number)):
        wanted = rows_to_keep(sum(one.rows for one in drawn), cfg.k)

        def blocks() -> Iterator[tuple[Ids, Ints]]:
            return (_keyed(store, number, one) for one in drawn)

        found = limits(blocks, len(read_centroids(store, path)), wanted)
        write_table(store, _limits_path(number), pa.table({"limit": found}))
    takes = [Item(slice_path(number, one.number), one.rows, one) for one in drawn]
    fitting.publish(takes, partial(TakeWorker, cfg, store.uri, number, held))
    return slices_of(store, number)


def slices_of(store: Store, number: int) -> list[Slice]:
    """The slices of the sample of a later round, those that have rows."""
    slices, start = [], 0
    for entry in sorted(store.list(sample_folder(number)), key=lambda entry: entry.path):
        with store.open(entry.path) as file:
            rows = pq.ParquetFile(file).metadata.num_rows
        if rows:
            name = entry.path.rpartition("/")[2].removesuffix(".parquet")
            slices.append(Slice(number, int(name), start, rows))
        start += rows
    return slices


class NearWorker:
    """Holds the centroids; assigns the rows of one slice a call."""

    def __init__(
        self, cfg: ClusterConfig, run_uri: str, number: int, path: str, held: Sequence[Floats]
    ) -> None:
        self._cfg, self._store, self._number, self._held = cfg, open_store(run_uri), number, held
        self._nearest = Nearest(self._store, path)

    def __call__(self, one: Slice) -> Counts:
        rows = self._held[one.number] if self._held else one.load(self._cfg, self._store)
        cluster = self._nearest(rows)
        cosine = scores_of(rows, self._nearest.centroids, cluster)
        table = pa.table({"cluster": cluster.astype(np.int32), "cosine": cosine})
        write_table(self._store, _near_path(self._number, one), table)
        return {"images": len(rows)}


class TakeWorker:
    """Holds the limits; publishes the rows of one slice a call that lie within them."""

    def __init__(
        self, cfg: ClusterConfig, run_uri: str, number: int, held: Sequence[Floats]
    ) -> None:
        self._cfg, self._store, self._number, self._held = cfg, open_store(run_uri), number, held
        self._limits = column_numpy(read_table(self._store, _limits_path(number)), "limit")

    def __call__(self, one: Slice) -> Counts:
        cluster, key = _keyed(self._store, self._number, one)
        rows = self._held[one.number] if self._held else one.load(self._cfg, self._store)
        taken = rows[key <= self._limits[cluster]]
        write_table(self._store, slice_path(self._number, one.number), slice_table(taken))
        return {"images": len(taken)}


def _keyed(store: Store, number: int, one: Slice) -> tuple[Ids, Ints]:
    """The cluster (n,) and the key (n,) of each row of a slice."""
    table = read_table(store, _near_path(number, one))
    return table["cluster"].to_numpy(), keys(table["cosine"].to_numpy(), one.start)


def _near_path(number: int, one: Slice) -> str:
    return f"{round_folder(number)}/near/{one.number:06d}.parquet"


def _limits_path(number: int) -> str:
    return f"{round_folder(number)}/limits.parquet"
