"""Kept pool -> centroids: Lloyd's iterations over slices of a sample.

`cluster/fit/sample/*`     the vectors of each slice, unless the sample is the whole pool
`cluster/fit/0007.parquet` the centroids that seven iterations have reached; a killed run goes on
`cluster/fit/0007/*`       the totals of groups of slices with these centroids

A sample that fits this process is swept here on all cores, a larger one by the workers: totals are
whole numbers, so that both give the same bytes. All of `cluster/fit` is deleted at the end.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from curation.algorithms import kmeans
from curation.algorithms.lloyd import BlockSweep, Clustering, Metric, Sweep, Totals, lloyd
from curation.algorithms.products import Floats, Ints
from curation.runtime.events import Events
from curation.runtime.executor import Counts, Executor, Item, Work, map_parts, require_all
from curation.runtime.store import Store, StoreError, open_store, read_table, write_table
from curation.stages.tables import (
    Embedded,
    Part,
    VectorView,
    column_bytes,
    read_decisions,
)

CENTROIDS_TABLE = "cluster/centroids.parquet"
FOLDER = "cluster/fit"
SLICE_ROWS = 131_072
HERE_BYTES = 2_000_000_000  # of vectors in fp32: a larger sample is swept by the workers
GROUPS = 64  # of slices: each writes totals of up to k x D whole numbers an iteration
METRIC = Metric(spherical=True)


@dataclass(frozen=True)
class ClusterConfig:
    """k clusters; see `recipe.Cluster`."""

    embedding: str
    k: int
    iterations: int
    sample_per_centroid: int
    start: str
    seed: int

    @property
    def view(self) -> VectorView:
        return VectorView(Embedded(self.embedding), "semantic", "kept")


@dataclass(frozen=True)
class Slice:
    """Consecutive parts and how many of their kept images are drawn; `whole`: all of them."""

    number: int
    parts: tuple[tuple[Part, int], ...]
    whole: bool

    @property
    def rows(self) -> int:
        return sum(count for _, count in self.parts)

    @property
    def path(self) -> str:
        return f"{FOLDER}/sample/{self.number:06d}.parquet"

    def load(self, cfg: ClusterConfig, store: Store) -> Floats:
        """Unit rows (n, D)."""
        if self.whole:
            return self.draw(cfg, store)
        rows = column_bytes(read_table(store, self.path), "vector").view(np.float16)
        return rows.astype(np.float32)

    def draw(self, cfg: ClusterConfig, store: Store) -> Floats:
        """The same rows from the vectors of the parts: each part has draws of its own."""
        found = []
        for part, count in self.parts:
            _, rows = cfg.view.load(store, part)
            rng = np.random.default_rng([cfg.seed, 1, part.part])
            found.append(rows[np.sort(rng.choice(len(rows), count, replace=False))])
        return np.concatenate(found)


def fit(
    cfg: ClusterConfig, pool: list[Part], store: Store, executor: Executor, events: Events
) -> None:
    """Writes `cluster/centroids.parquet`. Raises StoreError when no image is left."""
    slices = _slices(cfg, pool, store)
    if not slices:
        raise StoreError("cluster: no pool image is left after dedup; there is nothing to cluster")
    _draw(cfg, slices, store, executor, events)
    dim = slices[0].load(cfg, store).shape[1]
    here = 4 * dim * sum(one.rows for one in slices) <= HERE_BYTES
    loaded = [one.load(cfg, store) for one in slices] if here else []

    def blocks() -> Iterator[Floats]:
        return iter(loaded) if here else (one.load(cfg, store) for one in slices)

    sweep: Sweep = WorkersSweep(cfg, slices, store, executor, events)
    if here:
        sweep = BlockSweep(blocks, METRIC, kmeans.DEFAULT.make_assigner)

    def note(now: Clustering) -> None:
        _keep(now, store)
        reached = {"iteration": len(now.objective), "objective": now.objective[-1]}
        events.emit("cluster", "iteration", **reached)

    with _all_cores():
        start = _reached(store)
        if start is None:
            rng = np.random.default_rng(cfg.seed)
            count = sum(one.rows for one in slices)
            first = kmeans.first_centroids(blocks, count, cfg.k, rng, cfg.start, METRIC)
            start = Clustering(first, ())
            _keep(start, store)
        fitted = lloyd(start, sweep, cfg.iterations, METRIC, note)
    objective = " ".join(f"{value:.7f}" for value in fitted.objective)
    table = _table(fitted.centroids).replace_schema_metadata({"objective": objective})
    write_table(store, CENTROIDS_TABLE, table)


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Maths threads on every core for a while: what is done then must not depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def clear(store: Store) -> None:
    """Deletes what only the fit needed."""
    for entry in list(store.list(FOLDER)):
        store.delete(entry.path)


def read_centroids(store: Store, path: str = CENTROIDS_TABLE) -> Floats:
    """The centroids (k, D), unit rows."""
    column = read_table(store, path)["centroid"].combine_chunks()
    rows: Floats = column.flatten().to_numpy().reshape(len(column), -1).copy()  # writable
    return rows


def read_objective(store: Store) -> list[float]:
    """The objective of every iteration."""
    text = read_table(store, CENTROIDS_TABLE).schema.metadata[b"objective"].decode()
    return [float(value) for value in text.split()]


def _slices(cfg: ClusterConfig, pool: list[Part], store: Store) -> list[Slice]:
    """The sample, cut where parts end; the cuts don't depend on who does the work."""
    kept = []
    for part in pool:
        decisions = read_decisions(store, part)["decision"].to_numpy(zero_copy_only=False)
        kept.append(int((decisions == "kept").sum()))
    wanted = cfg.k * cfg.sample_per_centroid or sum(kept)
    drawn = shares(np.array(kept, np.int64), wanted, np.random.default_rng([cfg.seed, 1]))
    slices: list[Slice] = []
    parts: list[tuple[Part, int]] = []
    for part, count in zip(pool, drawn.tolist(), strict=True):
        if count:
            parts.append((part, count))
        if sum(count for _, count in parts) >= SLICE_ROWS or (parts and part == pool[-1]):
            slices.append(Slice(len(slices), tuple(parts), wanted >= sum(kept)))
            parts = []
    return slices


def shares(kept: Ints, wanted: int, rng: np.random.Generator) -> Ints:
    """How many images to draw of each part (p,) of `kept` (p,) images: `wanted` in all.

    Systematic sampling: each image has the same chance, and no part more than one image too many.
    """
    ends = np.cumsum(kept)
    total = int(ends[-1]) if len(ends) else 0
    if wanted >= total:
        return kept
    upto = (ends * wanted + rng.integers(total)) // total
    return np.diff(upto, prepend=0)


def _draw(
    cfg: ClusterConfig, slices: list[Slice], store: Store, executor: Executor, events: Events
) -> None:
    """Publishes the vectors of every slice, which the iterations then read again and again."""
    items = [Item(f"slice/{s.number:06d}", s.rows, s) for s in slices if not s.whole]
    if not items:
        return
    have = {entry.path for entry in store.list(f"{FOLDER}/sample")}
    worker = partial(DrawWorker, cfg, store.uri)
    work = Work("cluster", items, lambda item: item.payload.path in have, worker)
    require_all(map_parts(work, executor, events), "cluster")


class DrawWorker:
    """Draws the rows of one slice a call."""

    def __init__(self, cfg: ClusterConfig, run_uri: str) -> None:
        self._cfg, self._store = cfg, open_store(run_uri)

    def __call__(self, one: Slice) -> Counts:
        rows = one.draw(self._cfg, self._store)
        table = pa.table({"vector": _binary(rows.astype(np.float16))})  # as they are stored
        write_table(self._store, one.path, table)
        return {"images": len(rows)}


@dataclass(frozen=True)
class WorkersSweep:
    """A sweep in which each worker takes groups of slices and publishes their totals."""

    cfg: ClusterConfig
    slices: list[Slice]
    store: Store
    executor: Executor
    events: Events

    def __call__(self, centroids: Floats) -> Totals:
        path = _latest(self.store)
        folder = path.removesuffix(".parquet")
        have = {entry.path for entry in self.store.list(folder)}
        size = -(-len(self.slices) // GROUPS)
        groups = [self.slices[at : at + size] for at in range(0, len(self.slices), size)]
        items = [
            Item(f"{folder}/{number:06d}.parquet", sum(one.rows for one in group), (number, group))
            for number, group in enumerate(groups)
        ]
        worker = partial(SweepWorker, self.cfg, self.store.uri, path)
        work = Work("cluster", items, lambda item: item.name in have, worker)
        require_all(map_parts(work, self.executor, self.events), "cluster")
        totals = Totals.empty(*centroids.shape)
        for item in items:
            _merge(totals, read_table(self.store, item.name))
        return totals


class SweepWorker:
    """Holds the centroids; totals the rows of one group of slices a call."""

    def __init__(self, cfg: ClusterConfig, run_uri: str, path: str) -> None:
        self._cfg, self._store, self._path = cfg, open_store(run_uri), path
        self._centroids = read_centroids(self._store, path)

    def __call__(self, group: tuple[int, list[Slice]]) -> Counts:
        number, slices = group
        totals = Totals.empty(*self._centroids.shape)
        for one in slices:
            rows = one.load(self._cfg, self._store)
            nearest = kmeans.DEFAULT.make_assigner(METRIC.spherical)
            totals.add(rows, nearest(rows, self._centroids), METRIC)
        folder = self._path.removesuffix(".parquet")
        write_table(self._store, f"{folder}/{number:06d}.parquet", _totals_table(totals))
        return {"images": int(totals.counts.sum())}


def _totals_table(totals: Totals) -> pa.Table:
    """The clusters that have rows."""
    cluster = np.flatnonzero(totals.counts)
    columns = {
        "cluster": pa.array(cluster),
        "count": pa.array(totals.counts[cluster]),
        "sum": _binary(totals.sums[cluster]),
    }
    return pa.table(columns)


def _merge(totals: Totals, table: pa.Table) -> None:
    cluster = table["cluster"].to_numpy()
    totals.counts[cluster] += table["count"].to_numpy()
    totals.sums[cluster] += column_bytes(table, "sum").view(np.int64)


def _keep(now: Clustering, store: Store) -> None:
    """Publishes what is reached; then what led there may go."""
    path = f"{FOLDER}/{len(now.objective):04d}.parquet"
    objective = " ".join(map(repr, now.objective))  # every digit: a resumed run goes on from it
    facts = {"objective": objective, "rests": str(now.rests)}
    write_table(store, path, _table(now.centroids).replace_schema_metadata(facts))
    for entry in list(store.list(FOLDER)):
        if entry.path != path and not entry.path.startswith(f"{FOLDER}/sample/"):
            store.delete(entry.path)


def _latest(store: Store) -> str:
    """The table of the last iteration, or an empty name."""
    tables = [e.path for e in store.list(FOLDER) if e.path.count("/") == FOLDER.count("/") + 1]
    return max(tables, default="")


def _reached(store: Store) -> Clustering | None:
    """What an earlier run has published last."""
    path = _latest(store)
    if not path:
        return None
    facts = read_table(store, path).schema.metadata
    objective = tuple(float(value) for value in facts[b"objective"].decode().split())
    return Clustering(read_centroids(store, path), objective, facts[b"rests"] == b"True")


def _table(centroids: Floats) -> pa.Table:
    values = pa.array(centroids.ravel())
    return pa.table({"centroid": pa.FixedSizeListArray.from_arrays(values, centroids.shape[1])})


def _binary(rows: np.ndarray) -> pa.FixedSizeBinaryArray:
    """Rows of numbers as one binary value each."""
    width = rows.shape[1] * rows.itemsize
    buffer = pa.py_buffer(np.ascontiguousarray(rows).data)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, buffer])
