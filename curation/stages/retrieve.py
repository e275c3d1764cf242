"""Kept pool x curated sets -> the selected images, each with every reason for which it is in.

DINOv2, app. A.4: a set is taken as it is, by the nearest neighbours of each of its images, by draws
from the clusters that hold enough of them, or any combination. The union runs in this process:
about 60 bytes a choice (8.5 GB for 142 million).
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from curation.algorithms.kmeans import assign
from curation.algorithms.sampling import Floats, Ints, Words, backfill, draw_by_cluster, priorities
from curation.runtime.events import Events
from curation.runtime.executor import Executor, timer
from curation.runtime.manifest import StageReport, begin, fingerprint, finish
from curation.runtime.store import Store, StoreError, read_table, write_table
from curation.schema import RETRIEVED_BY, SAME_BYTES, SELECTED
from curation.stages.cluster import assignments_path, read_centroids
from curation.stages.neighbours import Join, answers, search
from curation.stages.tables import (
    Embedded,
    Part,
    VectorView,
    column_numpy,
    first_of_equal,
    ids_of,
    read_parts,
)

SELECTED_TABLE = "retrieve/selected.parquet"
SAME_BYTES_TABLE = "retrieve/same_bytes.parquet"
ROW_GROUP_ROWS = 65_536


@dataclass(frozen=True)
class SetConfig:
    """How one curated set is used; see the `retrieve` list of a recipe. k = 0: no sample mode."""

    name: str
    as_is: bool
    k: int
    collisions: str
    per_cluster: int  # 0: no cluster mode
    min_queries: int
    cap: int


@dataclass(frozen=True)
class RetrieveConfig:
    """All curated sets in order, and how neighbours are searched."""

    embedding: str
    sets: tuple[SetConfig, ...]
    exact_below: int
    target_recall: float
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


def run(
    cfg: RetrieveConfig, stage_fingerprint: str, store: Store, executor: Executor, events: Events
) -> StageReport:
    """Vectors, decisions, clusters -> `retrieve/selected.parquet`, one row a selected image."""
    elapsed = timer()
    begin(store, "retrieve", stage_fingerprint)
    embedded = Embedded(cfg.embedding)
    view = VectorView(embedded, "semantic", "kept")
    chosen: list[Choices] = []
    for one in cfg.sets:
        parts = [part for part in read_parts(store, "curated") if part.set == one.name]
        if one.as_is:
            chosen.append(_as_is(one, view, parts, store))
        if one.k:
            chosen.append(_sample(cfg, one, view, parts, store, executor, events))
        if one.per_cluster:
            chosen.append(_cluster(cfg, one, view, parts, embedded, store))
    counts = _write_selected(chosen, embedded, store)
    counts["modes"] = [
        {"set": c.set, "how": c.how, "images": len(np.unique(c.image)), **c.facts} for c in chosen
    ]
    return finish(store, StageReport("retrieve", stage_fingerprint, counts, elapsed()))


def _as_is(one: SetConfig, view: VectorView, parts: list[Part], store: Store) -> Choices:
    numbers = np.concatenate([view.load(store, part)[0] for part in parts])
    nothing = np.full(len(numbers), np.nan, np.float32)
    return Choices(one.name, "as_is", numbers, np.full(len(numbers), -1), nothing)


def _sample(
    cfg: RetrieveConfig,
    one: SetConfig,
    view: VectorView,
    parts: list[Part],
    store: Store,
    executor: Executor,
    events: Events,
) -> Choices:
    """k nearest pool images of each query; with `backfill` k that no other query has."""
    pool = read_parts(store, "pool")
    depth, kept = one.k, sum(part.rows for part in pool)
    while True:
        join = Join(
            stage="retrieve",
            folder=f"retrieve/neighbours/{one.name}/k{depth}",
            queries=view,
            base=view,
            k=depth,
            min_cosine=-2.0,
            itself=False,
            exact_below=cfg.exact_below,
            target_recall=cfg.target_recall,
            seed=cfg.seed,
        )
        facts = search(join, parts, pool, store, executor, events)
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
    return Choices(one.name, "sample", image, query, cosine, facts=facts)


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


def _cluster(
    cfg: RetrieveConfig,
    one: SetConfig,
    view: VectorView,
    parts: list[Part],
    embedded: Embedded,
    store: Store,
) -> Choices:
    """Draws from every cluster that holds at least `min_queries` images of the set."""
    centroids = read_centroids(store)
    hits = np.zeros(len(centroids), np.int64)
    for part in parts:
        cluster, _ = assign(view.load(store, part)[1], centroids)
        hits += np.bincount(cluster, minlength=len(hits))
    eligible = hits >= one.min_queries
    image, cosine, cluster = np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int64)
    priority = np.empty(0, np.uint64)
    seed = int(fingerprint(cfg.seed, one.name)[:15], 16)  # each set draws for itself
    for part in read_parts(store, "pool"):
        table = read_table(store, assignments_path(part))
        table = table.filter(pa.array(eligible[table["cluster"].to_numpy()]))
        if not len(table):
            continue
        numbers = column_numpy(table, "image")
        image = np.concatenate([image, numbers])
        cosine = np.concatenate([cosine, table["cosine"].to_numpy()])
        cluster = np.concatenate([cluster, column_numpy(table, "cluster")])
        words = id_words(ids_of(store, embedded, [part], numbers))
        priority = np.concatenate([priority, priorities(words, seed)])
        if len(image) > 2 * int(eligible.sum()) * one.per_cluster:
            keep = draw_by_cluster(cluster, priority, one.per_cluster, len(image))
            image, cosine, cluster = image[keep], cosine[keep], cluster[keep]
            priority = priority[keep]
    keep = draw_by_cluster(cluster, priority, one.per_cluster, one.cap)
    facts = {"queries": int(hits.sum()), "clusters": int(eligible.sum())}
    none = np.full(len(keep), -1)
    return Choices(one.name, "cluster", image[keep], none, cosine[keep], cluster[keep], facts)


def id_words(ids: Any) -> Words:
    """The first 8 bytes of ids (n, 32) as uint64."""
    words: Words = np.ascontiguousarray(ids[:, :8]).view(">u8")[:, 0].astype(np.uint64)
    return words


def _write_selected(chosen: list[Choices], embedded: Embedded, store: Store) -> dict[str, Any]:
    """The union by content: the same bytes once, under the smallest number (curated sets first)."""
    image = np.concatenate([c.image for c in chosen])
    if not len(image):
        searched = any(c.facts.get("queries") for c in chosen)
        why = (
            "no cluster holds min_queries images of a set"
            if searched
            else "no curated image is left"
        )
        raise StoreError(f"retrieve: nothing was selected; {why}")
    numbers = np.unique(image)
    ids = ids_of(store, embedded, read_parts(store), numbers)
    keeper = first_of_equal(numbers, ids)
    copies = keeper != numbers
    same = pa.Table.from_arrays(
        [pa.array(numbers[copies]), pa.array(keeper[copies])], schema=SAME_BYTES
    )
    write_table(store, SAME_BYTES_TABLE, same)
    owner = keeper[np.searchsorted(numbers, image)]
    order = np.argsort(owner, kind="stable")
    reasons = _reasons(chosen, embedded, store).take(pa.array(order))
    selected, starts = np.unique(owner[order], return_index=True)
    offsets = pa.array(np.r_[starts, len(order)].astype(np.int32))
    selected_ids = ids[np.searchsorted(numbers, selected)]
    columns = [
        pa.array(selected),
        pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(32), len(selected), [None, pa.py_buffer(selected_ids.tobytes())]
        ),
        pa.ListArray.from_arrays(offsets, reasons),
    ]
    table = pa.Table.from_arrays(columns, schema=SELECTED)
    write_table(store, SELECTED_TABLE, table, row_group_size=ROW_GROUP_ROWS)
    return {"selected": len(selected), "choices": len(image), "same_bytes": int(copies.sum())}


def _reasons(chosen: list[Choices], embedded: Embedded, store: Store) -> pa.StructArray:
    """The RETRIEVED_BY struct of every choice, in order."""
    numbers = np.unique(np.concatenate([c.query for c in chosen]))
    numbers = numbers[numbers >= 0]
    ids = ids_of(store, embedded, read_parts(store, "curated"), numbers)
    query_ids = pa.array([row.tobytes().hex() for row in ids], pa.string())
    blocks = []
    for c in chosen:
        count = len(c.image)
        asked = np.searchsorted(numbers, c.query)
        ways = pa.array([c.how]).take(pa.array(np.zeros(count, np.int64)))
        if c.cluster is not None:
            names = pa.array([f"cluster:{n}" for n in range(c.cluster.max(initial=-1) + 1)])
            ways = names.cast(pa.string()).take(pa.array(c.cluster))
        fields = [
            pa.array([c.set]).take(pa.array(np.zeros(count, np.int64))),
            query_ids.take(pa.array(asked, mask=c.query < 0)),
            ways,
            pa.array(c.cosine, pa.float32(), mask=np.isnan(c.cosine)),
        ]
        blocks.append(pa.StructArray.from_arrays(fields, fields=list(RETRIEVED_BY)))
    return pa.concat_arrays(blocks)
