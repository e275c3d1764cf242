"""The tables of the cluster stage: centroids, and slices of the sample that they are fitted on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curation.algorithms import groups
from curation.algorithms.assign import assigner
from curation.algorithms.groups import Groups
from curation.algorithms.products import Floats, Ints
from curation.algorithms.visits import Base, Rows
from curation.runtime.events import Events
from curation.runtime.executor import Executor, Item, MakeWorker, Work, map_parts, require_all
from curation.runtime.store import Store, read_table, write_table
from curation.stages.tables import Embedded, Part, VectorView, column_bytes

CENTROIDS_TABLE = "cluster/centroids.parquet"
FOLDER = "cluster/fit"


@dataclass(frozen=True)
class ClusterConfig:
    """k clusters; see `recipe.Cluster`."""

    embedding: str
    k: int
    iterations: int
    sample_per_centroid: int
    start: str
    seed: int
    resample: int

    @property
    def view(self) -> VectorView:
        return VectorView(Embedded(self.embedding), "semantic", "kept")


@dataclass(frozen=True)
class Fitting:
    """What centroids are fitted with."""

    cfg: ClusterConfig
    store: Store
    executor: Executor
    events: Events

    def publish(self, items: Sequence[Item], make_worker: MakeWorker) -> None:
        """Has workers publish the tables that items are named after, those that are not there."""
        have = {entry.path for entry in self.store.list(FOLDER)}
        work = Work("cluster", items, lambda item: item.name in have, make_worker)
        require_all(map_parts(work, self.executor, self.events), "cluster")


@dataclass(frozen=True)
class Slice:
    """A bounded piece of the sample of round `round`: `rows` rows from place `start` of it.

    They lie in a table of their own, or in `parts`: all kept images of these.
    """

    round: int
    number: int
    start: int
    rows: int
    parts: tuple[Part, ...] = ()

    @property
    def path(self) -> str:
        return slice_path(self.round, self.number)

    def load(self, cfg: ClusterConfig, store: Store) -> Floats:
        """Unit rows (n, D)."""
        if self.parts:
            return np.concatenate([cfg.view.load(store, part)[1] for part in self.parts])
        rows = column_bytes(read_table(store, self.path), "vector").view(np.float16)
        return rows.astype(np.float32)


def round_folder(number: int) -> str:
    return f"{FOLDER}/{number:03d}"


def sample_folder(number: int) -> str:
    """Where the sample of a round lies."""
    return f"{round_folder(number)}/sample"


def slice_path(of_round: int, number: int) -> str:
    return f"{sample_folder(of_round)}/{number:06d}.parquet"


def slice_table(rows: Floats) -> pa.Table:
    """Unit rows (n, D), as they are stored."""
    return pa.table({"vector": binary(rows.astype(np.float16))})


def read_centroids(store: Store, path: str = CENTROIDS_TABLE) -> Floats:
    """The centroids (k, D), unit rows."""
    column = read_table(store, path)["centroid"].combine_chunks()
    rows: Floats = column.flatten().to_numpy().reshape(len(column), -1).copy()  # writable
    return rows


def read_objective(store: Store) -> list[float]:
    """The objective of every iteration, in the last round."""
    text = read_table(store, CENTROIDS_TABLE).schema.metadata[b"objective"].decode()
    return [float(value) for value in text.split()]


def centroids_table(centroids: Floats, facts: dict[str, str]) -> pa.Table:
    values = pa.array(centroids.ravel())
    rows = pa.FixedSizeListArray.from_arrays(values, centroids.shape[1])
    return pa.table({"centroid": rows}).replace_schema_metadata(facts)


class Nearest:
    """Published centroids as a worker holds them; very many with the groups published for them."""

    def __init__(self, store: Store, path: str = CENTROIDS_TABLE) -> None:
        self.centroids = read_centroids(store, path)
        self._groups = None
        if len(self.centroids) > groups.MANY:
            self._groups = _read_groups(store, path, self.centroids)

    def __call__(self, rows: Floats) -> Ints:
        """Number (n,) of the nearest centroid of each row (n, D): see `groups.assigners`."""
        if self._groups is None:
            return assigner()(rows, self.centroids)
        return self._groups.assign(rows, self.centroids)


def publish_groups(store: Store, path: str, centroids: Floats, probe: Callable[[], Floats]) -> None:
    """For workers that read the centroids at `path`: made once, so that all find the same."""
    if len(centroids) <= groups.MANY or store.exists(_groups_path(path)):
        return
    found = Groups.over(centroids, probe())
    members = pa.ListArray.from_arrays(found.base.starts.astype(np.int32), found.base.members)
    table = centroids_table(found.groups, {"beam": str(found.beam)})
    write_table(store, _groups_path(path), table.append_column("members", members))


def _read_groups(store: Store, path: str, centroids: Floats) -> Groups:
    table = read_table(store, _groups_path(path))
    members = table["members"].combine_chunks()
    numbers, starts = members.values.to_numpy(), members.offsets.to_numpy().astype(np.int64)
    base = Base(Rows(centroids, np.arange(len(centroids))), numbers, starts)
    return Groups(
        base, read_centroids(store, _groups_path(path)), int(table.schema.metadata[b"beam"])
    )


def _groups_path(path: str) -> str:
    return f"{path.removesuffix('.parquet')}/groups.parquet"


def binary(rows: np.ndarray) -> pa.FixedSizeBinaryArray:
    """Rows of numbers as one binary value each."""
    width = rows.shape[1] * rows.itemsize
    buffer = pa.py_buffer(np.ascontiguousarray(rows).data)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, buffer])
