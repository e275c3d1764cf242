"""The fit over slices: the same bytes in this process and by workers, stopped or not."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from curation.algorithms import groups, kmeans
from curation.algorithms.assign import Assigner, assign
from curation.algorithms.hierarchy import nearest_of_each
from curation.runtime.events import Events
from curation.runtime.executor import InProcessExecutor, MakeWorker, Outcome
from curation.runtime.ray_executor import RayExecutor
from curation.runtime.store import FileStore, Store, StoreError, read_table, write_table
from curation.schema import DECISIONS, PARTS, PARTS_TABLE, vectors
from curation.stages import centroids, cluster, cluster_sample
from curation.stages.cluster_tables import (
    CENTROIDS_TABLE,
    ClusterConfig,
    binary,
    read_centroids,
    read_objective,
)
from curation.stages.tables import Embedded, Part, decisions_path, read_parts

DIM = 16
CONFIG = ClusterConfig(
    "models", k=7, iterations=6, sample_per_centroid=40, start="random", seed=3, resample=0
)


def unit(count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, DIM))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_pool(
    store: Store, sizes: Sequence[int], kept: float = 0.8, given: np.ndarray | None = None
) -> None:
    """Parts of these sizes as the stages before leave them; a share of their images is kept.

    Of the vectors `given` (n, DIM), or random ones.
    """
    rng, base = np.random.default_rng(1), 0
    parts = []
    for number, rows in enumerate(sizes):
        part = Part(number, "pool", "", "s", "folder", "t", 0, rows, base, f"print{number}")
        parts.append(vars(part))
        mine = unit(rows, number) if given is None else given[base : base + rows]
        base += rows
        table = pa.table(
            [
                pa.array(np.arange(rows, dtype=np.int32)),
                binary(mine.astype(np.float16)),
                binary(np.ones((rows, 2), np.float16)),
            ],
            schema=vectors(DIM, 2),
        )
        write_table(store, Embedded("models").vectors_path(part), table)
        decision = np.where(rng.random(rows) < kept, "kept", "duplicate_of").tolist()
        nothing: list[None] = [None] * rows
        columns: list[Any] = [decision, nothing, nothing, nothing]
        decided = {field.name: column for field, column in zip(DECISIONS, columns, strict=True)}
        write_table(store, decisions_path(part), pa.table(decided, schema=DECISIONS))
    write_table(store, PARTS_TABLE, pa.Table.from_pylist(parts, schema=PARTS))


SIZES = (90, 1, 200, 40, 0, 130, 77)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    store = FileStore(str(tmp_path / "run"))
    write_pool(store, SIZES)
    return store


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_sample, "SLICE_ROWS", 50)
    monkeypatch.setattr(centroids, "GROUPS", 3)


def fitted(store: FileStore, cfg: ClusterConfig = CONFIG, executor: Any = None) -> bytes:
    """The table of centroids, from nothing."""
    for entry in list(store.list("cluster")):
        store.delete(entry.path)
    cluster.run(cfg, "print", store, executor or InProcessExecutor(), Events(store))
    left = {entry.path.split("/")[1] for entry in store.list("cluster")}
    files = {"assignments", "centroids.parquet", "done.json", "started.json"}
    assert left == files | ({"centroids"} if cfg.k > groups.MANY else set())
    return store.read(CENTROIDS_TABLE)


@pytest.mark.parametrize("sample", [40, 0])
@pytest.mark.parametrize(("start", "rounds"), [("random", 0), ("random", 3), ("k-means++", 1)])
def test_workers_fit_what_this_process_fits(
    store: FileStore, sample: int, start: str, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = ClusterConfig("models", 7, 6, sample, start, 3, rounds)
    here = fitted(store, cfg)
    torch.set_num_threads(1)
    monkeypatch.setattr(centroids, "HERE_BYTES", 0)
    assert fitted(store, cfg) == here
    monkeypatch.setattr(centroids, "GROUPS", 64)
    assert fitted(store, cfg) == here


def test_the_fit_is_that_of_all_kept_vectors(store: FileStore) -> None:
    """Against the plain function over one array."""
    cfg = ClusterConfig("models", 7, 6, 0, "random", 3, 0)
    fitted(store, cfg)
    rows = np.concatenate([cfg.view.load(store, part)[1] for part in read_parts(store, "pool")])
    whole = kmeans.fit(rows, 7, 6, np.random.default_rng(3))
    assert read_centroids(store).tobytes() == whole.centroids.tobytes()
    assert read_objective(store) == [round(value, 7) for value in whole.objective]


@pytest.mark.parametrize("here_bytes", [0, 1 << 30])
def test_resampling_is_that_of_all_rows_in_memory(
    store: FileStore, here_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the plain functions over one array, as in `hierarchy.fit_flat`."""
    monkeypatch.setattr(centroids, "HERE_BYTES", here_bytes)
    cfg = ClusterConfig("models", 7, 6, 0, "k-means++", 3, 2)
    fitted(store, cfg)
    rows = np.concatenate([cfg.view.load(store, part)[1] for part in read_parts(store, "pool")])
    near, options = np.arange(len(rows)), kmeans.Options(start="k-means++")
    for seed in (3, [3, 2, 1], [3, 2, 2]):
        found = kmeans.fit(rows[near], 7, 6, np.random.default_rng(seed), options).centroids
        near = nearest_of_each(*assign(rows, found), len(rows) // 14)
    assert read_centroids(store).tobytes() == found.tobytes()


def test_resampling_spreads_centroids_over_the_support(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a quarter circle that is a hundred times denser at one end: how unlike are the gaps?"""
    monkeypatch.setattr(cluster_sample, "SLICE_ROWS", 1000)
    unlike: dict[int, list[float]] = {0: [], 5: []}
    for seed, rounds in itertools.product(range(4), unlike):
        where = np.random.default_rng(seed).random(3000)
        angles = np.pi / 2 * (1 - np.log1p(99 * where) / np.log(100))
        rows = np.zeros((3000, DIM))
        rows[:, 0], rows[:, 1] = np.cos(angles), np.sin(angles)
        store = FileStore(str(tmp_path / f"{seed}-{rounds}"))
        write_pool(store, [1000] * 3, 1, rows)
        fitted(store, ClusterConfig("models", 16, 20, 0, "k-means++", seed, rounds))
        found = read_centroids(store)
        gaps = np.diff(np.sort(np.arctan2(found[:, 1], found[:, 0])))
        unlike[rounds].append(gaps.std() / gaps.mean())
    assert np.mean(unlike[5]) < 0.8 * np.mean(unlike[0]), unlike


@pytest.mark.parametrize("rounds", [0, 1])
def test_many_centroids_are_found_through_the_same_groups_by_all(
    store: FileStore, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The centroids and the assignments; in this process, by workers, and of parts in any order."""
    monkeypatch.setattr(groups, "MANY", 39)
    monkeypatch.setattr(groups, "AGREEMENT", 0.5)  # so that what is found depends on the groups
    cfg = ClusterConfig("models", 40, 3, 8, "random", 3, rounds)
    exact = Assigner(spherical=True)

    def found(reverse: bool = False) -> list[bytes]:
        executor = InProcessExecutor()
        if reverse:
            run = executor.map
            monkeypatch.setattr(
                executor, "map", lambda make, items, gpu: run_back(run, make, items)
            )
        fitted(store, cfg, executor)
        return [store.read(entry.path) for entry in store.list("cluster/assignments")]

    here, first = found(), store.read(CENTROIDS_TABLE)
    monkeypatch.setattr(centroids, "HERE_BYTES", 0)
    for reverse in (False, True):
        assert found(reverse) == here
        assert store.read(CENTROIDS_TABLE) == first
    parts = read_parts(store, "pool")
    rows = np.concatenate([cfg.view.load(store, part)[1] for part in parts])
    tables = [read_table(store, cluster.assignments_path(part)) for part in parts]
    mine = np.concatenate([table["cluster"].to_numpy() for table in tables])
    share = (mine == exact(rows, read_centroids(store))).mean()
    assert 0.5 < share < 1


def run_back(run: Any, make_worker: MakeWorker, items: Sequence[Any]) -> Iterator[Outcome]:
    for outcome in run(make_worker, items[::-1]):
        yield replace(outcome, item=len(items) - 1 - outcome.item)


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_one_two_and_four_ray_workers_fit_the_same(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = ClusterConfig("models", 7, 2, 40, "random", 3, 0)
    here = fitted(store, cfg)
    monkeypatch.setattr(centroids, "HERE_BYTES", 0)
    for workers in (1, 2, 4):
        executor = RayExecutor("local", workers)
        try:
            assert fitted(store, cfg, executor) == here
        finally:
            executor.close()


class Stopped(BaseException):
    """Not an Exception: nothing may catch it on the way."""


class FailingExecutor(InProcessExecutor):
    """Stops the run after some items."""

    def __init__(self, items: int) -> None:
        self.left = items

    def map(
        self, make_worker: MakeWorker, items: Sequence[Any], gpu: bool = False
    ) -> Iterator[Outcome]:
        for outcome in super().map(make_worker, items, gpu):
            yield outcome
            self.left -= 1
            if not self.left:
                raise Stopped


@pytest.mark.slow
def test_a_fit_that_stops_anywhere_goes_on_to_the_same_bytes(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every item of the workers; what ran before is not run again."""
    whole = fitted(store)
    monkeypatch.setattr(centroids, "HERE_BYTES", 0)
    for items in range(1, 22, 4):
        at = stopped_and_run_again(store, CONFIG, items)
        assert store.read(CENTROIDS_TABLE) == whole, (items, at)
    assert at > "cluster/fit/000/0003"
    cfg = replace(CONFIG, iterations=1, resample=2)
    whole, reached = fitted(store, cfg), []
    for items in range(1, 28):
        reached.append(stopped_and_run_again(store, cfg, items))
        assert store.read(CENTROIDS_TABLE) == whole, (items, reached[-1])
    assert {"", *(f"cluster/fit/00{n}/000{m}.parquet" for n in (0, 1, 2) for m in (0, 1))} >= {
        *reached
    }
    assert len({*reached}) > 5


def stopped_and_run_again(store: FileStore, cfg: ClusterConfig, items: int) -> str:
    """The centroids that the first run had reached."""
    for entry in list(store.list("cluster")):
        store.delete(entry.path)
    with pytest.raises(Stopped):
        cluster.run(cfg, "print", store, FailingExecutor(items), Events(store))
    at, _ = centroids._latest(store)
    cluster.run(cfg, "print", store, InProcessExecutor(), Events(store))
    return at


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_stop_in_this_process_goes_on_with_the_last_iteration(
    store: FileStore, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fitted(store)
    for entry in list(store.list("cluster")):
        store.delete(entry.path)
    events = Events(store)
    seen: list[int] = []

    def emit(stage: str, event: str, **fields: Any) -> None:
        if event == "iteration":
            seen.append(fields["iteration"])
            if seen[-1] == stop:
                raise Stopped

    monkeypatch.setattr(events, "emit", emit)
    with pytest.raises(Stopped):
        cluster.run(CONFIG, "print", store, InProcessExecutor(), events)
    cluster.run(CONFIG, "print", store, InProcessExecutor(), events)
    assert seen == list(range(1, 7))
    assert store.read(CENTROIDS_TABLE) == whole


@pytest.mark.parametrize(
    ("sizes", "k", "clusters"), [((1,), 5, 1), ((0, 3, 0), 9, 3), ((30, 10), 1, 1)]
)
def test_small_pools_have_fewer_clusters(
    tmp_path: Path, sizes: tuple[int, ...], k: int, clusters: int
) -> None:
    store = FileStore(str(tmp_path / "run"))
    write_pool(store, sizes, kept=1)
    fitted(store, ClusterConfig("models", k, 5, 256, "random", 0, 1))
    assert len(read_centroids(store)) == clusters


@pytest.mark.parametrize("sizes", [(), (5, 4)])
def test_an_empty_pool_is_told(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    store = FileStore(str(tmp_path / "run"))
    write_pool(store, sizes, kept=0)
    with pytest.raises(StoreError, match="no pool image is left after dedup"):
        cluster.run(CONFIG, "print", store, InProcessExecutor(), Events(store))


@pytest.mark.parametrize("wanted", [1, 7, 60, 99, 100, 1000])
def test_shares_of_parts_are_exact_and_even(wanted: int) -> None:
    kept = np.array([0, 10, 50, 0, 1, 39])
    drawn = np.stack(
        [cluster_sample.shares(kept, wanted, np.random.default_rng(s)) for s in range(300)]
    )
    assert (drawn.sum(axis=1) == min(wanted, 100)).all()
    fair = kept * min(wanted, 100) / 100
    assert (np.abs(drawn - fair) < 1).all()
    np.testing.assert_allclose(drawn.mean(axis=0), fair, atol=0.15)
