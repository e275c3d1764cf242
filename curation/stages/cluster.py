"""Kept pool -> centroids and the cluster of every kept image (spherical k-means).

`centroids.py` fits the centroids; workers then assign all images.
"""

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from curation.algorithms.assign import scores_of
from curation.algorithms.products import Ints
from curation.runtime.events import Events
from curation.runtime.executor import Counts, Executor, Item, Work, map_parts, require_all, timer
from curation.runtime.manifest import StageReport, begin, finish
from curation.runtime.store import Store, open_store, read_table, write_table
from curation.schema import ASSIGNMENTS
from curation.stages import centroids
from curation.stages.cluster_tables import (
    CENTROIDS_TABLE,
    ClusterConfig,
    Nearest,
    read_centroids,
    read_objective,
)
from curation.stages.tables import Part, VectorView, overlapped, read_parts


def run(
    cfg: ClusterConfig, stage_fingerprint: str, store: Store, executor: Executor, events: Events
) -> StageReport:
    """Kept pool -> `cluster/centroids.parquet` and `cluster/assignments/*.parquet`."""
    elapsed = timer()
    begin(store, "cluster", stage_fingerprint)
    pool = read_parts(store, "pool")
    if not store.exists(CENTROIDS_TABLE):
        centroids.fit(cfg, pool, store, executor, events)
    centroids.clear(store)
    have = {entry.path for entry in store.list("cluster/assignments")}
    items = [Item(part.name(), part.rows, part) for part in pool]
    worker = partial(AssignWorker, cfg.view, store.uri)
    result = map_parts(
        Work("cluster", items, lambda i: assignments_path(i.payload) in have, worker),
        executor,
        events,
    )
    require_all(result, "cluster")
    sizes = sizes_of(store, len(read_centroids(store)))
    counts: dict[str, Any] = {"clusters": len(sizes), "images": int(sizes.sum())}
    counts |= {"empty": int((sizes == 0).sum()), "largest": int(sizes.max())}
    counts |= {"objective": read_objective(store)}
    counts |= {"computed": result.computed, "reused": result.reused}
    return finish(store, StageReport("cluster", stage_fingerprint, counts, elapsed()))


def assignments_path(part: Part) -> str:
    return f"cluster/assignments/{part.part:06d}.parquet"


def sizes_of(store: Store, clusters: int) -> Ints:
    """Kept pool images of each cluster (k,)."""
    sizes = np.zeros(clusters, np.int64)

    def read(part: Part) -> pa.Table:
        return read_table(store, assignments_path(part), ["cluster"])

    for _, table in overlapped(read_parts(store, "pool"), read):
        sizes += np.bincount(table["cluster"].to_numpy(), minlength=clusters)
    return sizes


class AssignWorker:
    """Holds the centroids; assigns the kept images of one part a call."""

    def __init__(self, view: VectorView, run_uri: str) -> None:
        self._view, self._store = view, open_store(run_uri)
        self._nearest = Nearest(self._store)

    def __call__(self, part: Part) -> Counts:
        numbers, rows = self._view.load(self._store, part)
        cluster = self._nearest(rows)
        cosine = scores_of(rows, self._nearest.centroids, cluster)
        arrays = [pa.array(numbers), pa.array(cluster.astype(np.int32)), pa.array(cosine)]
        table = pa.Table.from_arrays(arrays, schema=ASSIGNMENTS)
        write_table(self._store, assignments_path(part), table)
        return {"images": len(numbers)}
