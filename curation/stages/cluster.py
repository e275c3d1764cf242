"""Kept pool -> centroids and the cluster of every kept image (spherical k-means).

The centroids are fitted on a seeded sample of `sample_per_centroid` x k images in this process
(at k = 100,000 and 384 dimensions that is 39 GB); workers then assign all images.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from curation.algorithms import kmeans
from curation.runtime.events import Events
from curation.runtime.executor import Counts, Executor, Item, Work, map_parts, require_all, timer
from curation.runtime.manifest import StageReport, begin, finish
from curation.runtime.store import Store, StoreError, open_store, read_table, write_table
from curation.schema import ASSIGNMENTS
from curation.stages.tables import Embedded, Part, VectorView, read_decisions, read_parts

CENTROIDS_TABLE = "cluster/centroids.parquet"
FIT_ROWS = 512  # a thread's block of products: 0.2 GB at k = 100,000


@dataclass(frozen=True)
class ClusterConfig:
    """k clusters; see `recipe.Cluster`."""

    embedding: str
    k: int
    iterations: int
    sample_per_centroid: int
    seed: int


def run(
    cfg: ClusterConfig, stage_fingerprint: str, store: Store, executor: Executor, events: Events
) -> StageReport:
    """Kept pool -> `cluster/centroids.parquet` and `cluster/assignments/*.parquet`."""
    elapsed = timer()
    begin(store, "cluster", stage_fingerprint)
    view = VectorView(Embedded(cfg.embedding), "semantic", "kept")
    pool = read_parts(store, "pool")
    if not store.exists(CENTROIDS_TABLE):
        _fit(cfg, view, pool, store)
    have = {entry.path for entry in store.list("cluster/assignments")}
    items = [Item(part.name(), part.rows, part) for part in pool]
    worker = partial(AssignWorker, view, store.uri)
    result = map_parts(
        Work("cluster", items, lambda i: assignments_path(i.payload) in have, worker),
        executor,
        events,
    )
    require_all(result, "cluster")
    sizes = np.zeros(len(read_centroids(store)), np.int64)
    for part in pool:
        cluster = read_table(store, assignments_path(part), ["cluster"])["cluster"].to_numpy()
        sizes += np.bincount(cluster, minlength=len(sizes))
    fitted = read_table(store, CENTROIDS_TABLE).schema.metadata[b"objective"].decode()
    counts: dict[str, Any] = {"clusters": len(sizes), "images": int(sizes.sum())}
    counts |= {"empty": int((sizes == 0).sum()), "largest": int(sizes.max())}
    counts |= {"objective": [float(x) for x in fitted.split()]}
    counts |= {"computed": result.computed, "reused": result.reused}
    return finish(store, StageReport("cluster", stage_fingerprint, counts, elapsed()))


def assignments_path(part: Part) -> str:
    return f"cluster/assignments/{part.part:06d}.parquet"


def read_centroids(store: Store) -> kmeans.Floats:
    """The centroids (k, D), unit rows."""
    table = read_table(store, CENTROIDS_TABLE)
    rows: kmeans.Floats = np.stack(table["centroid"].to_numpy())
    return rows


def _fit(cfg: ClusterConfig, view: VectorView, pool: list[Part], store: Store) -> None:
    sample = _sample(cfg, view, pool, store)
    if not len(sample):
        raise StoreError("cluster: no pool image is left after dedup; there is nothing to cluster")
    rng = np.random.default_rng(cfg.seed)
    fitted = kmeans.fit(sample, cfg.k, cfg.iterations, rng, _assign_on_all_cores)
    values = pa.array(fitted.centroids.ravel())
    column = pa.FixedSizeListArray.from_arrays(values, fitted.centroids.shape[1])
    objective = " ".join(f"{value:.7f}" for value in fitted.objective)
    table = pa.table({"centroid": column}).replace_schema_metadata({"objective": objective})
    write_table(store, CENTROIDS_TABLE, table)


def _assign_on_all_cores(
    rows: kmeans.Floats, centroids: kmeans.Floats
) -> tuple[kmeans.Ints, kmeans.Floats]:
    """Blocks in parallel, each by one thread: the same bytes whatever the number of cores."""
    blocks = [rows[start : start + FIT_ROWS] for start in range(0, len(rows), FIT_ROWS)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda block: kmeans.assign(block, centroids), blocks))
    return np.concatenate([c for c, _ in found]), np.concatenate([v for _, v in found])


def _sample(cfg: ClusterConfig, view: VectorView, pool: list[Part], store: Store) -> kmeans.Floats:
    """All kept vectors, or a uniform sample when there are more than the fit needs."""
    kept = []
    for part in pool:
        decisions = read_decisions(store, part)["decision"].to_numpy(zero_copy_only=False)
        kept.append(int((decisions == "kept").sum()))
    total, wanted = sum(kept), cfg.k * cfg.sample_per_centroid
    rng = np.random.default_rng([cfg.seed, 1])
    chosen = (
        np.sort(rng.choice(total, wanted, replace=False)) if wanted < total else np.arange(total)
    )
    blocks, start = [], 0
    for part, count in zip(pool, kept, strict=True):
        low, high = np.searchsorted(chosen, [start, start + count])
        if low < high:
            _, rows = view.load(store, part)
            blocks.append(rows[chosen[low:high] - start])
        start += count
    return np.concatenate(blocks) if blocks else np.empty((0, 1), np.float32)


class AssignWorker:
    """Holds the centroids; assigns the kept images of one part a call."""

    def __init__(self, view: VectorView, run_uri: str) -> None:
        self._view, self._store = view, open_store(run_uri)
        self._centroids = read_centroids(self._store)

    def __call__(self, part: Part) -> Counts:
        numbers, rows = self._view.load(self._store, part)
        cluster, cosine = kmeans.assign(rows, self._centroids)
        arrays = [pa.array(numbers), pa.array(cluster.astype(np.int32)), pa.array(cosine)]
        table = pa.Table.from_arrays(arrays, schema=ASSIGNMENTS)
        write_table(self._store, assignments_path(part), table)
        return {"images": len(numbers)}
