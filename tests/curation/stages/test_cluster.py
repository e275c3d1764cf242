"""The fit over slices: the same bytes in this process and by workers, stopped or not."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from curation.algorithms import kmeans
from curation.runtime.events import Events
from curation.runtime.executor import InProcessExecutor, MakeWorker, Outcome
from curation.runtime.ray_executor import RayExecutor
from curation.runtime.store import FileStore, Store, StoreError, write_table
from curation.schema import DECISIONS, PARTS, vectors
from curation.stages import centroids, cluster
from curation.stages.centroids import CENTROIDS_TABLE, ClusterConfig, read_centroids
from curation.stages.tables import PARTS_TABLE, Embedded, Part, decisions_path, read_parts

DIM = 16
CONFIG = ClusterConfig("models", k=7, iterations=6, sample_per_centroid=40, start="random", seed=3)


def unit(count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, DIM))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_pool(store: Store, sizes: Sequence[int], kept: float = 0.8) -> None:
    """Parts of these sizes as the stages before leave them; a share of their images is kept."""
    rng, base = np.random.default_rng(1), 0
    parts = []
    for number, rows in enumerate(sizes):
        part = Part(number, "pool", "", "s", "folder", "t", 0, rows, base, f"print{number}")
        parts.append(vars(part))
        base += rows
        table = pa.table(
            [
                pa.array(np.arange(rows, dtype=np.int32)),
                centroids._binary(unit(rows, number).astype(np.float16)),
                centroids._binary(np.ones((rows, 2), np.float16)),
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
    monkeypatch.setattr(centroids, "SLICE_ROWS", 50)
    monkeypatch.setattr(centroids, "GROUPS", 3)


def fitted(store: FileStore, cfg: ClusterConfig = CONFIG, executor: Any = None) -> bytes:
    """The table of centroids, from nothing."""
    for entry in list(store.list("cluster")):
        store.delete(entry.path)
    cluster.run(cfg, "print", store, executor or InProcessExecutor(), Events(store))
    left = {entry.path.split("/")[1] for entry in store.list("cluster")}
    assert left == {"assignments", "centroids.parquet", "done.json", "started.json"}
    return store.read(CENTROIDS_TABLE)


@pytest.mark.parametrize("sample", [40, 0])
@pytest.mark.parametrize("start", ["random", "k-means++"])
def test_workers_fit_what_this_process_fits(
    store: FileStore, sample: int, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = ClusterConfig("models", 7, 6, sample, start, 3)
    here = fitted(store, cfg)
    torch.set_num_threads(1)
    monkeypatch.setattr(centroids, "HERE_BYTES", 0)
    assert fitted(store, cfg) == here
    monkeypatch.setattr(centroids, "GROUPS", 64)
    assert fitted(store, cfg) == here


def test_the_fit_is_that_of_all_kept_vectors(store: FileStore) -> None:
    """Against the plain function over one array."""
    cfg = ClusterConfig("models", 7, 6, 0, "random", 3)
    fitted(store, cfg)
    rows = np.concatenate([cfg.view.load(store, part)[1] for part in read_parts(store, "pool")])
    whole = kmeans.fit(rows, 7, 6, np.random.default_rng(3))
    assert read_centroids(store).tobytes() == whole.centroids.tobytes()
    assert centroids.read_objective(store) == [round(value, 7) for value in whole.objective]


@pytest.mark.slow
def test_one_two_and_four_ray_workers_fit_the_same(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = ClusterConfig("models", 7, 2, 40, "random", 3)
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


def test_a_fit_that_stops_anywhere_goes_on_to_the_same_bytes(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every item of the workers; what ran before is not run again."""
    whole = fitted(store)
    monkeypatch.setattr(centroids, "HERE_BYTES", 0)
    for items in range(1, 22, 4):
        for entry in list(store.list("cluster")):
            store.delete(entry.path)
        with pytest.raises(Stopped):
            cluster.run(CONFIG, "print", store, FailingExecutor(items), Events(store))
        at = centroids._latest(store)
        cluster.run(CONFIG, "print", store, InProcessExecutor(), Events(store))
        assert store.read(CENTROIDS_TABLE) == whole, (items, at)
    assert at > "cluster/fit/0003"


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
    fitted(store, ClusterConfig("models", k, 5, 256, "random", 0))
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
    drawn = np.stack([centroids.shares(kept, wanted, np.random.default_rng(s)) for s in range(300)])
    assert (drawn.sum(axis=1) == min(wanted, 100)).all()
    fair = kept * min(wanted, 100) / 100
    assert (np.abs(drawn - fair) < 1).all()
    np.testing.assert_allclose(drawn.mean(axis=0), fair, atol=0.15)
