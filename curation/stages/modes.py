"""How each mode of a curated set chooses images.

DINOv2, app. A.4: a set is taken as it is, by the nearest neighbours of each of its images, or by
draws from the clusters that hold enough of them. `hierarchical.py` has the mode that balances.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from curation.algorithms.assign import assign
from curation.algorithms.sampling import Floats, Ints, Words, backfill, draw_by_cluster, priorities
from curation.runtime.events import Events
from curation.runtime.executor import Executor
from curation.runtime.manifest import fingerprint
from curation.runtime.store import Store, read_table
from curation.schema import ASSIGNMENTS
from curation.stages.cluster import assignments_path
from curation.stages.cluster_tables import read_centroids
from curation.stages.neighbour_plan import Join, SearchConfig
from curation.stages.neighbours import answers, search
from curation.stages.tables import (
    Embedded,
    Part,
    VectorView,
    column_numpy,
    ids_of,
    read_ahead,
    read_parts,
)


@dataclass(frozen=True)
class SampleConfig:
    """See `recipe_modes.Sample`."""

    k: int
    collisions: str


@dataclass(frozen=True)
class ClusterDrawConfig:
    """See `recipe_modes.ClusterDraw`."""

    per_cluster: int
    min_queries: int
    cap: int


@dataclass(frozen=True)
class HierarchicalConfig:
    """`counts` are the clusters of the levels above the first; see `recipe_modes.Hierarchical`."""

    counts: tuple[int, ...]
    target_size: int


@dataclass(frozen=True)
class SetConfig:
    """How one curated set is used: the modes of its `retrieve` list."""

    name: str
    as_is: bool
    sample: SampleConfig | None
    cluster: ClusterDrawConfig | None
    hierarchical: HierarchicalConfig | None


@dataclass(frozen=True)
class RetrieveConfig:
    """All curated sets in order, and how neighbours are searched."""

    embedding: str
    sets: tuple[SetConfig, ...]
    search: SearchConfig
    seed: int


@dataclass
class Choices:
    """Chosen images, a row each: number, query's number or -1, how, cosine (NaN: none)."""

    set: str
    how: str
    image: Ints
    query: Ints
    cosine: Floats
    cluster: Ints | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One set for which a mode is to choose images."""

    cfg: RetrieveConfig
    set: str
    store: Store

    @property
    def view(self) -> VectorView:
        return VectorView(Embedded(self.cfg.embedding), "semantic", "kept")

    @property
    def parts(self) -> list[Part]:
        """The parts of the set itself."""
        return [part for part in read_parts(self.store, "curated") if part.set == self.set]


def as_is(task: Task) -> Choices:
    """All kept images of the set."""
    view, store = task.view, task.store
    numbers = np.concatenate([view.load(store, part)[0] for part in task.parts])
    nothing = np.full(len(numbers), np.nan, np.float32)
    return Choices(task.set, "as_is", numbers, np.full(len(numbers), -1), nothing)


def sample(task: Task, one: SampleConfig, executor: Executor, events: Events) -> Choices:
    """k nearest pool images of each query; with `backfill` k that no other query has."""
    cfg, store, view = task.cfg, task.store, task.view
    pool = read_parts(store, "pool")
    depth, kept = one.k, sum(part.rows for part in pool)
    while True:
        join = Join(
            stage="retrieve",
            folder=f"retrieve/neighbours/{task.set}/k{depth}",
            queries=view,
            base=view,
            k=depth,
            min_cosine=-2.0,
            itself=False,
            how=cfg.search,
            seed=cfg.seed,
        )
        facts = search(join, task.parts, pool, store, executor, events)
        table = pa.concat_tables(answers(join, store))
        query, image = column_numpy(table, "query"), column_numpy(table, "image")
        cosine = table["cosine"].to_numpy()
        queries = len(np.unique(query))
        if one.collisions == "merge":
            break
        taken = _backfill(query, image, cosine, one.k)
        if taken.sum() == one.k * queries or depth >= kept:
            query, image, cosine = query[taken], image[taken], cosine[taken]
            break
        depth = min(2 * depth, kept)
    facts |= {"queries": queries, "asked": one.k * queries}
    facts["collisions"] = len(image) - len(np.unique(image))
    facts["missing"] = one.k * queries - len(image)
    return Choices(task.set, "sample", image, query, cosine, facts=facts)


def _backfill(query: Ints, image: Ints, cosine: Floats, k: int) -> Any:
    """`sampling.backfill` over (query, image, cosine) rows that are grouped by query."""
    starts = np.flatnonzero(np.r_[True, query[1:] != query[:-1]])
    counts = np.diff(np.r_[starts, len(query)])
    row = np.repeat(np.arange(len(starts)), counts)
    column = np.arange(len(query)) - np.repeat(starts, counts)
    numbers = np.full((len(starts), counts.max(initial=0)), -1)
    cosines = np.full(numbers.shape, -np.inf, np.float32)
    numbers[row, column], cosines[row, column] = image, cosine
    return backfill(cosines, numbers, k)[row, column]


def cluster(task: Task, one: ClusterDrawConfig) -> Choices:
    """Draws from every cluster that holds at least `min_queries` images of the set."""
    centroids = read_centroids(task.store)
    hits = np.zeros(len(centroids), np.int64)
    for part in task.parts:
        nearest, _ = assign(task.view.load(task.store, part)[1], centroids)
        hits += np.bincount(nearest, minlength=len(hits))
    eligible = hits >= one.min_queries
    drawn = draw(task, np.where(eligible, one.per_cluster, 0), one.cap)
    none = np.full(len(drawn), -1)
    facts = {"queries": int(hits.sum()), "clusters": int(eligible.sum())}
    image, cosine = column_numpy(drawn, "image"), drawn["cosine"].to_numpy()
    ways = column_numpy(drawn, "cluster")
    return Choices(task.set, "cluster", image, none, cosine, ways, facts)


def draw(task: Task, quota: Ints, cap: int) -> pa.Table:
    """Rows of the assignments drawn at random: up to each cluster's quota (k,), `cap` in all.

    A set's draws depend on the images alone, not on their order. Memory: twice the images drawn and
    those of one part, 90 bytes each while they are cut.
    """
    seed = int(fingerprint(task.cfg.seed, task.set)[:15], 16)  # each set draws for itself
    none = ASSIGNMENTS.append(pa.field("priority", pa.uint64())).empty_table()
    blocks, held = [none], 0

    def candidates(part: Part) -> pa.Table:
        table = read_table(task.store, assignments_path(part))
        table = table.filter(pa.array(quota[table["cluster"].to_numpy()] > 0))
        words = id_words(
            ids_of(task.store, task.view.embedded, [part], column_numpy(table, "image"))
        )
        return table.append_column("priority", pa.array(priorities(words, seed)))

    for _, table in read_ahead(read_parts(task.store, "pool"), candidates):
        blocks.append(table)
        held += len(table)
        if held > 2 * min(int(quota.sum()), cap):
            blocks = [_drawn(blocks, quota, cap)]
            held = len(blocks[0])
    return _drawn(blocks, quota, cap)


def _drawn(blocks: list[pa.Table], quota: Ints, cap: int) -> pa.Table:
    table = pa.concat_tables(blocks)
    priority = table["priority"].to_numpy()
    keep = draw_by_cluster(column_numpy(table, "cluster"), priority, quota, cap)
    return table.take(pa.array(keep)).combine_chunks()


def id_words(ids: Any) -> Words:
    """The first 8 bytes of ids (n, 32) as uint64."""
    words: Words = np.ascontiguousarray(ids[:, :8]).view(">u8")[:, 0].astype(np.uint64)
    return words
