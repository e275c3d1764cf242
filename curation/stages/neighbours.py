"""The search that dedup and retrieve share: for every query the nearest images of a base table.

Small bases are compared whole. For larger ones the base is put in cells and the cells in buckets
(`neighbour_index.py`); queries are sent to the buckets whose cells they ask in (algorithms/knn.py),
each bucket is read once by one worker and answers all of them, and the answers go back to the
queries' chunks:

    chunks of the base  ─► partition ─► buckets ─► answer ─► chunks of queries ─► merge
    chunks of queries   ─► route ──────────┘

Every step publishes a file an item, so that a killed search goes on where it was. Rows are sent
in waves, so that their copies never take more than `spill_bytes`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from curation.algorithms import knn
from curation.algorithms.products import NONE
from curation.runtime.events import Events
from curation.runtime.executor import Executor, all_cores
from curation.runtime.store import Store, StoreError, delete_all, read_table
from curation.stages.neighbour_index import (
    Asking,
    Crew,
    build,
    draw_queries,
    sample_base,
    sizes,
)
from curation.stages.neighbour_plan import Group, Join, Layout, Plan, Sample
from curation.stages.neighbour_workers import (
    AnswerWorker,
    ExactWorker,
    MergeWorker,
    RouteWorker,
    SlabWorker,
    as_neighbours,
    best_of,
    rows_of,
)
from curation.stages.tables import Part, column_numpy, overlapped

EXACT_ROWS = 16_384  # queries compared with a whole base together
CHUNK_ROWS = 65_536  # rows that are partitioned or routed together, more if they are very many
MOST_CHUNKS = 4096  # each bucket reads of each chunk: above, requests outweigh the work
SLAB_ROWS = 1_000_000  # base rows of one IVF-PQ index: 2 GB at 512 dimensions
TEMPORARY = ("truth", "equal", "queries", "pairs", "setup")
Search = tuple[Join, Sequence[Part]]  # a search and its queries


def search(
    join: Join,
    query_parts: Sequence[Part],
    base_parts: Sequence[Part],
    store: Store,
    executor: Executor,
    events: Events,
) -> dict[str, Any]:
    """Answers every query; returns how it was searched and the recall measured on a sample.

    Errors: StoreError when a part of the work failed, or the target recall was not reached.
    """
    crew = Crew(store, executor, events)
    return search_all([(join, query_parts)], base_parts, crew)[0]


def search_all(
    searches: Sequence[Search], base_parts: Sequence[Part], crew: Crew
) -> list[dict[str, Any]]:
    """`search` for several joins with one base, which is put in cells once.

    They differ in `folder`, `queries` and `k` alone.
    """
    store = crew.store
    todo = [one for one in searches if not store.exists(_summary(one[0]))]
    for join, facts in _search_all(todo, base_parts, crew):
        store.write(_summary(join), json.dumps(facts).encode())
    for join, _ in searches:  # only now: a search that was killed needs them to go on
        for folder in (*(f"{join.folder}/{name}" for name in TEMPORARY), join.index):
            _delete(store, folder)
    return [json.loads(store.read(_summary(join))) for join, _ in searches]


def _summary(join: Join) -> str:
    return f"{join.folder}/search.json"


def answers(join: Join, store: Store) -> Iterator[pa.Table]:
    """The answers, a table a chunk, in order of the queries."""
    paths = _tables(store, f"{join.folder}/answers")
    for _, table in overlapped(paths, partial(read_table, store)):
        yield table


def _delete(store: Store, folder: str) -> None:
    delete_all(store, _tables(store, folder))


def _tables(store: Store, folder: str) -> list[str]:
    return sorted(entry.path for entry in store.list(folder))


def chunks(parts: Sequence[Part], rows: int) -> tuple[Group, ...]:
    """Consecutive parts in groups of about `rows` images."""
    groups: list[list[Part]] = []
    filled = rows
    for part in parts:
        if filled + part.rows > rows:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += part.rows
    return tuple(tuple(group) for group in groups)


def chunk_rows(images: int) -> int:
    """Rows that are partitioned or routed together, of so many images."""
    return max(CHUNK_ROWS, -(-images // MOST_CHUNKS))


def _search_all(
    searches: Sequence[Search], base_parts: Sequence[Part], crew: Crew
) -> Iterator[tuple[Join, dict[str, Any]]]:
    if not searches:
        return
    how, held = searches[0][0].how, sum(part.rows for part in base_parts)
    if held <= how.exact_below:
        base = chunks(base_parts, CHUNK_ROWS)
        for join, parts in searches:
            yield join, _compare_all(Asking(join, Layout(chunks(parts, EXACT_ROWS), base)), crew)
        return
    base = chunks(base_parts, SLAB_ROWS if how.method == "ivfpq" else chunk_rows(held))
    asking = []
    for join, parts in searches:
        rows = chunk_rows(sum(part.rows for part in parts))
        asking.append(Asking(join, Layout(chunks(parts, rows), base)))
    for one in asking:
        if not crew.store.exists(one.join.setup("sample")):
            draw_queries(one, crew.store)
    if how.method == "cells":
        build(asking, crew)
    else:
        sample_base(asking[0], knn.cell_count(held, held), crew)
    for one in asking:
        by = _by_cells if how.method == "cells" else _by_slabs
        yield one.join, {"method": how.method, **by(one, crew), "recall": _merged(one, crew)}


def _compare_all(one: Asking, crew: Crew) -> dict[str, Any]:
    join, layout = one.join, one.layout
    worker = partial(ExactWorker, join, crew.store.uri, layout)
    crew.work(join.stage, partial(join.path, "answers"), sizes(layout.queries), worker)
    return {"method": "exact", "recall": 1.0}


def _by_slabs(one: Asking, crew: Crew) -> dict[str, Any]:
    join, layout = one.join, one.layout
    slab = partial(SlabWorker, join, crew.store.uri, layout)
    crew.work(join.stage, partial(join.sent, "pairs", 0), sizes(layout.base), slab)
    return {}


def _by_cells(one: Asking, crew: Crew) -> dict[str, Any]:
    """Sends queries to buckets, and answers in each what is asked there."""
    join, layout, store = one.join, one.layout, crew.store
    if not store.exists(join.setup("route")):
        _choose_way(join, store)
    plan = Plan.load(store, join.setup("route"))
    waves = _waves(join, layout, plan, store)
    for wave in waves:
        to = partial(join.sent, "pairs", wave[0])
        have = {*_tables(store, f"{join.folder}/pairs")}
        if {to(bucket) for bucket in range(plan.buckets)} <= have:
            continue
        images = [size for size in sizes(layout.queries) if size[0] in wave]
        route = partial(RouteWorker, join, store.uri, layout)
        crew.work(join.stage, partial(join.sent, "queries"), images, route)
        share = sum(count for _, count in images) // plan.buckets
        answer = partial(AnswerWorker, join, store.uri, layout, wave)
        crew.work(join.stage, to, [(bucket, share) for bucket in range(plan.buckets)], answer)
        _delete(store, f"{join.folder}/queries")
    facts = {"cells": len(plan.cells), "nprobe": round(plan.nprobe, 1), "buckets": plan.buckets}
    return facts | {"waves": len(waves)}


def _merged(one: Asking, crew: Crew) -> float:
    """Gathers the answers of every chunk of queries; returns the recall."""
    join = one.join
    merge = partial(MergeWorker, join, crew.store.uri, _tables(crew.store, f"{join.folder}/pairs"))
    crew.work(join.stage, partial(join.path, "answers"), sizes(one.layout.queries), merge)
    recall = _recall(join, crew.store)
    if recall < join.how.target_recall:
        raise StoreError(
            f"{join.stage}: the search reached recall {recall:.4f} on a sample, below"
            f" search.target_recall = {join.how.target_recall}; lower that or raise"
            " search.exact_below"
        )
    return recall


def _choose_way(join: Join, store: Store) -> None:
    """How far queries ask, by the sample's true neighbours."""
    plan = Plan.load(store, join.cells)
    sample = Sample.load(join, store)
    what, rows = sample.sampling.asked(join.what), sample.queries.vectors
    table = best_of(_truth(join, store), what.k)
    sampled, rank = np.unique(column_numpy(table, "query"), return_inverse=True)
    table = table.filter(pa.array(what.telling(as_neighbours(table, sampled, what.k))[rank]))
    pairs = knn.Pairs(column_numpy(table, "query"), column_numpy(table, "cell"), rows_of(table))
    try:
        with all_cores():
            reach = knn.choose_reach(plan.cells, rows, pairs, what)
            nprobe = float((plan.cells.way(rows, reach) != NONE).sum(axis=1).mean())
    except knn.RecallError as error:
        raise StoreError(
            f"{join.stage}: {error}; lower search.target_recall or raise search.exact_below"
        ) from None
    replace(plan, reach=reach, nprobe=nprobe).save(store, join.setup("route"))


def _truth(join: Join, store: Store) -> pa.Table:
    """The sample's neighbours in every chunk of the base; `query` is a position in the sample."""
    paths = _tables(store, f"{join.folder}/truth")
    return pa.concat_tables([table for _, table in overlapped(paths, partial(read_table, store))])


def _waves(join: Join, layout: Layout, plan: Plan, store: Store) -> list[list[int]]:
    """The chunks of queries that are sent at once, by how many copies the sample would need."""
    sample = Sample.load(join, store).queries.vectors
    row, step = np.nonzero((way := plan.cells.way(sample, plan.reach)) != NONE)
    sent = np.unique(row * plan.buckets + plan.bucket_of(way[row, step]))
    copies = len(sent) / len(sample)
    row_bytes = 2 * sample.shape[1] + 8 + 4 * len(row) / len(sent)
    most = join.how.spill_bytes / (copies * row_bytes)
    waves: list[list[int]] = []
    filled = 0
    for number, images in sizes(layout.queries):
        if not waves or filled + images > most:
            waves.append([])
            filled = 0
        waves[-1].append(number)
        filled += images
    return waves


def _recall(join: Join, store: Store) -> float:
    """Of the sample's true neighbours, the share that stands in the answers."""
    sample = Sample.load(join, store)
    numbers = sample.queries.numbers
    truth = _truth(join, store).select(["query", "image", "cosine"])
    true = as_neighbours(truth, np.arange(len(numbers)), sample.sampling.asked(join.what).k)
    found = pa.concat_tables(
        table.filter(pa.array(np.isin(table["query"].to_numpy(), numbers)))
        for table in answers(join, store)
    )
    return knn.recall(as_neighbours(found, numbers, join.k), true, join.what.alike)
