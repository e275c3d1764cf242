"""Kept pool -> centroids: Lloyd's iterations over slices of a sample, in one or more rounds.

`cluster/fit/000/sample/*`     the vectors of each slice, unless the sample is the whole pool
`cluster/fit/000/0007.parquet` the centroids that seven iterations have reached
`cluster/fit/000/0007/*`       the totals of groups of slices with these centroids
`cluster/fit/001/*`            the first round that is fitted again, on a sample from `resample.py`

A sample that fits this process is swept here on all cores, a larger one by the workers: totals are
whole numbers, so that both give the same bytes. A killed run goes on with the last round and
iteration. All of `cluster/fit` is deleted at the end.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa

from curation.algorithms import kmeans
from curation.algorithms.groups import assigners
from curation.algorithms.lloyd import Blocks, BlockSweep, Clustering, Metric, Sweep, Totals, lloyd
from curation.algorithms.products import Floats
from curation.runtime.events import Events
from curation.runtime.executor import Counts, Executor, InProcessExecutor, Item, all_cores
from curation.runtime.store import (
    Store,
    StoreError,
    delete_all,
    open_store,
    read_table,
    write_table,
)
from curation.stages import cluster_sample
from curation.stages.cluster_tables import (
    CENTROIDS_TABLE,
    FOLDER,
    ClusterConfig,
    Fitting,
    Nearest,
    Slice,
    binary,
    centroids_table,
    publish_groups,
    read_centroids,
    round_folder,
    sample_folder,
)
from curation.stages.resample import resample, slices_of
from curation.stages.tables import Part, column_bytes

HERE_BYTES = 2_000_000_000  # of vectors in fp32: a larger sample is swept by the workers
GROUPS = 64  # of slices: each writes totals of up to k x D whole numbers an iteration
METRIC = Metric(spherical=True)
Probe = Callable[[], Floats]  # rows on which finding the nearest is tried, read when needed
REACHED = re.compile(rf"{FOLDER}/(\d+)/\d+\.parquet")


def fit(
    cfg: ClusterConfig, pool: list[Part], store: Store, executor: Executor, events: Events
) -> None:
    """Writes `cluster/centroids.parquet`. Raises StoreError when no image is left."""
    fitting = Fitting(cfg, store, executor, events)
    drawn = cluster_sample.draw(fitting, pool)
    if not drawn:
        raise StoreError("cluster: no pool image is left after dedup; there is nothing to cluster")
    dim = drawn[0].load(cfg, store).shape[1]
    count = sum(one.rows for one in drawn)
    held: list[Floats] = []
    if 4 * dim * count <= HERE_BYTES:
        fitting = replace(fitting, executor=InProcessExecutor())
        held = [one.load(cfg, store) for one in drawn]
    probe = functools.cache(partial(kmeans.probe, _blocks(fitting, drawn, held), count))
    with all_cores():
        fitted = _fit_rounds(fitting, drawn, held, probe)
        publish_groups(store, CENTROIDS_TABLE, fitted.centroids, probe)
    objective = " ".join(f"{value:.7f}" for value in fitted.objective)
    write_table(store, CENTROIDS_TABLE, centroids_table(fitted.centroids, {"objective": objective}))


def _blocks(fitting: Fitting, slices: list[Slice], held: Sequence[Floats]) -> Blocks:
    """The rows of slices, from `held` if this process holds them."""
    return lambda: held or (one.load(fitting.cfg, fitting.store) for one in slices)


def _fit_rounds(
    fitting: Fitting, drawn: list[Slice], held: Sequence[Floats], probe: Probe
) -> Clustering:
    """What the last round has fitted."""
    cfg, store = fitting.cfg, fitting.store
    _, number = _latest(store)
    slices = slices_of(store, number) if number else drawn
    while True:
        rows = [one.load(cfg, store) for one in slices] if held and number else held
        fitted = _fit_round(fitting, number, slices, rows, probe)
        if number == cfg.resample:
            return fitted
        path, _ = _latest(store)
        publish_groups(store, path, fitted.centroids, probe)
        number += 1
        slices = resample(fitting, number, path, drawn, held)
        images = sum(one.rows for one in slices)
        if images <= cfg.k:  # each row would be its own centroid
            return fitted
        fitting.events.emit("cluster", "resampled", round=number, images=images)


def _fit_round(
    fitting: Fitting, number: int, slices: list[Slice], held: Sequence[Floats], probe: Probe
) -> Clustering:
    """k-means of one sample, in this process if that holds its rows."""
    cfg, store, blocks = fitting.cfg, fitting.store, _blocks(fitting, slices, held)
    start = _reached(store, number)
    if start is None:
        rng = np.random.default_rng([cfg.seed, 2, number] if number else cfg.seed)
        count = sum(one.rows for one in slices)
        first = kmeans.first_centroids(blocks, count, cfg.k, rng, cfg.start, METRIC)
        start = Clustering(first, ())
        _keep(start, number, store)
    sweep: Sweep = WorkersSweep(fitting, slices, probe)
    if held:
        make_assigner = assigners(METRIC.spherical, len(start.centroids), probe)
        sweep = BlockSweep(blocks, METRIC, make_assigner)

    def note(now: Clustering) -> None:
        _keep(now, number, store)
        reached = {"iteration": len(now.objective), "objective": now.objective[-1]}
        fitting.events.emit("cluster", "iteration", **reached, round=number)

    return lloyd(start, sweep, cfg.iterations, METRIC, note)


def clear(store: Store) -> None:
    """Deletes what only the fit needed."""
    delete_all(store, [entry.path for entry in store.list(FOLDER)])


@dataclass(frozen=True)
class WorkersSweep:
    """A sweep in which each worker takes groups of slices and publishes their totals."""

    fitting: Fitting
    slices: list[Slice]
    probe: Probe

    def __call__(self, centroids: Floats) -> Totals:
        cfg, store = self.fitting.cfg, self.fitting.store
        path, _ = _latest(store)
        publish_groups(store, path, centroids, self.probe)
        size = -(-len(self.slices) // GROUPS)
        groups = [self.slices[at : at + size] for at in range(0, len(self.slices), size)]
        items = [
            Item(_totals_path(path, number), sum(one.rows for one in group), (number, group))
            for number, group in enumerate(groups)
        ]
        self.fitting.publish(items, partial(SweepWorker, cfg, store.uri, path))
        totals = Totals.empty(*centroids.shape)
        for item in items:
            _merge(totals, read_table(store, item.name))
        return totals


class SweepWorker:
    """Holds the centroids; totals the rows of one group of slices a call."""

    def __init__(self, cfg: ClusterConfig, run_uri: str, path: str) -> None:
        self._cfg, self._store, self._path = cfg, open_store(run_uri), path
        self._nearest = Nearest(self._store, path)

    def __call__(self, group: tuple[int, list[Slice]]) -> Counts:
        number, slices = group
        totals = Totals.empty(*self._nearest.centroids.shape)
        for one in slices:
            rows = one.load(self._cfg, self._store)
            totals.add(rows, self._nearest(rows), METRIC)
        write_table(self._store, _totals_path(self._path, number), _totals_table(totals))
        return {"images": int(totals.counts.sum())}


def _totals_path(path: str, group: int) -> str:
    return f"{path.removesuffix('.parquet')}/{group:06d}.parquet"


def _totals_table(totals: Totals) -> pa.Table:
    """The clusters that have rows."""
    cluster = np.flatnonzero(totals.counts)
    columns = {
        "cluster": pa.array(cluster),
        "count": pa.array(totals.counts[cluster]),
        "sum": binary(totals.sums[cluster]),
    }
    return pa.table(columns)


def _merge(totals: Totals, table: pa.Table) -> None:
    cluster = table["cluster"].to_numpy()
    totals.counts[cluster] += table["count"].to_numpy()
    totals.sums[cluster] += column_bytes(table, "sum").view(np.int64)


def _keep(now: Clustering, number: int, store: Store) -> None:
    """Publishes what round `number` has reached; then what led there may go, except the samples."""
    path = f"{round_folder(number)}/{len(now.objective):04d}.parquet"
    objective = " ".join(map(repr, now.objective))  # every digit: a resumed run goes on from it
    facts = {"objective": objective, "rests": str(now.rests)}
    write_table(store, path, centroids_table(now.centroids, facts))
    needed = (path, f"{sample_folder(0)}/", f"{sample_folder(number)}/")
    found = [entry.path for entry in store.list(FOLDER)]
    delete_all(store, [path for path in found if not path.startswith(needed)])


def _latest(store: Store) -> tuple[str, int]:
    """The centroids of the last round and iteration, and its round; an empty name if none are."""
    found = [match for entry in store.list(FOLDER) if (match := REACHED.fullmatch(entry.path))]
    last = max(found, key=lambda match: match[0], default=None)
    return (last[0], int(last[1])) if last else ("", 0)


def _reached(store: Store, number: int) -> Clustering | None:
    """What an earlier run has published last, if it came to round `number`."""
    path, last = _latest(store)
    if not path or last < number:
        return None
    facts = read_table(store, path).schema.metadata
    objective = tuple(float(value) for value in facts[b"objective"].decode().split())
    return Clustering(read_centroids(store, path), objective, facts[b"rests"] == b"True")
