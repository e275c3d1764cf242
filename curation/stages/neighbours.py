"""The search that dedup and retrieve share: for every query the nearest images of a base table.

Small bases are compared whole. For larger ones the base is put in cells and the cells in buckets;
queries are sent to the buckets whose cells they ask in (algorithms/knn.py), each bucket is read
once by one worker and answers all of them, and the answers go back to the queries' chunks:

    chunks of the base  ─► partition ─► buckets ─► answer ─► chunks of queries ─► merge
    chunks of queries   ─► route ──────────┘

Every step publishes a file an item, so that a killed search goes on where it was. Queries are sent
in waves, so that their copies never take more than `spill_bytes`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from curation.algorithms import knn
from curation.algorithms.best import NONE
from curation.algorithms.cells import Cells
from curation.algorithms.products import Floats, Ints
from curation.runtime.events import Events
from curation.runtime.executor import Executor, Item, MakeWorker, Work, map_parts, require_all
from curation.runtime.store import Store, StoreError, read_table
from curation.stages.neighbour_plan import (
    Group,
    Join,
    Layout,
    Plan,
    load_arrays,
    save_arrays,
)
from curation.stages.neighbour_workers import (
    AnswerWorker,
    ExactWorker,
    MergeWorker,
    PartitionWorker,
    RouteWorker,
    SlabWorker,
    as_neighbours,
    best_of,
    load,
    load_distinct,
    rows_of,
)
from curation.stages.tables import Part, column_numpy

EXACT_ROWS = 16_384  # queries compared with a whole base together
CHUNK_ROWS = 65_536  # rows that are partitioned or routed together, more if they are very many
MOST_CHUNKS = 4096  # each bucket reads of each chunk: above, requests outweigh the work
BUCKET_ROWS = 262_144  # base rows answered together: 0.5 GB at 512 dimensions
SLAB_ROWS = 1_000_000  # base rows of one IVF-PQ index: 2 GB at 512 dimensions
FIT_ROWS = 1 << 21  # base rows that cells are fitted on, in this process: 8.6 GB at 512 dimensions
SAMPLE_QUERIES = 1024
TEMPORARY = ("base", "truth", "queries", "pairs", "setup")


Path = Callable[[int], str]


@dataclass(frozen=True)
class Crew:
    """Where a search runs."""

    store: Store
    executor: Executor
    events: Events

    def work(
        self, stage: str, path: Path, items: Sequence[tuple[int, int]], make: MakeWorker
    ) -> None:
        """Runs the items (number, images) of one step whose file is not there yet."""
        have = {entry.path for entry in self.store.list(path(0).rpartition("/")[0])}
        todo = [Item(path(number), images, number) for number, images in items]
        work = Work(stage, todo, lambda item: item.name in have, make)
        require_all(map_parts(work, self.executor, self.events), stage)


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
    summary_path = f"{join.folder}/search.json"
    crew = Crew(store, executor, events)
    if not store.exists(summary_path):
        if sum(part.rows for part in base_parts) <= join.how.exact_below:
            facts = _compare_all(join, query_parts, base_parts, crew)
        else:
            facts = _search(join, query_parts, base_parts, crew)
        store.write(summary_path, json.dumps(facts).encode())
    for name in TEMPORARY:  # only now: a search that was killed needs them to go on
        _delete(store, f"{join.folder}/{name}")
    answered: dict[str, Any] = json.loads(store.read(summary_path))
    return answered


def answers(join: Join, store: Store) -> Iterator[pa.Table]:
    """The answers, a table a chunk, in order of the queries."""
    for path in _answer_paths(join, store):
        yield read_table(store, path)


def _delete(store: Store, folder: str) -> None:
    for entry in list(store.list(folder)):
        store.delete(entry.path)


def _answer_paths(join: Join, store: Store) -> list[str]:
    return sorted(entry.path for entry in store.list(f"{join.folder}/answers"))


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


def _sizes(groups: Sequence[Group]) -> list[tuple[int, int]]:
    return [(number, sum(part.rows for part in group)) for number, group in enumerate(groups)]


def _compare_all(
    join: Join, query_parts: Sequence[Part], base_parts: Sequence[Part], crew: Crew
) -> dict[str, Any]:
    layout = Layout(chunks(query_parts, EXACT_ROWS), chunks(base_parts, CHUNK_ROWS))
    worker = partial(ExactWorker, join, crew.store.uri, layout)
    crew.work(join.stage, partial(join.path, "answers"), _sizes(layout.queries), worker)
    return {"method": "exact", "recall": 1.0}


def _search(
    join: Join, query_parts: Sequence[Part], base_parts: Sequence[Part], crew: Crew
) -> dict[str, Any]:
    asking, held = (sum(part.rows for part in parts) for parts in (query_parts, base_parts))
    rows = SLAB_ROWS if join.how.method == "ivfpq" else chunk_rows(held)
    layout = Layout(chunks(query_parts, chunk_rows(asking)), chunks(base_parts, rows))
    store, uri = crew.store, crew.store.uri
    if not store.exists(join.setup("sample")):
        _draw_sample(join, layout, store)
    facts: dict[str, Any] = {"method": join.how.method}
    if join.how.method == "ivfpq":
        slab = partial(SlabWorker, join, uri, layout)
        crew.work(join.stage, partial(join.path, "pairs", 1), _sizes(layout.base), slab)
    else:
        facts |= _by_cells(join, layout, crew)
    found = sorted(entry.path for entry in store.list(f"{join.folder}/pairs"))
    merge = partial(MergeWorker, join, uri, found)
    crew.work(join.stage, partial(join.path, "answers"), _sizes(layout.queries), merge)
    facts["recall"] = _recall(join, store)
    if facts["recall"] < join.how.target_recall:
        raise StoreError(
            f"{join.stage}: the search reached recall {facts['recall']:.4f} on a sample, below"
            f" search.target_recall = {join.how.target_recall}; lower that or raise"
            " search.exact_below"
        )
    return facts


def _draw_sample(join: Join, layout: Layout, store: Store) -> None:
    """Queries whose true neighbours will be found, and base rows that cells are fitted on.

    Both are evenly spaced over chunks and rows.
    """
    step = max(1, len(layout.queries) // 16)
    picked = [load_distinct(join, store, chunk)[0] for chunk in layout.queries[::step]]
    numbers = np.concatenate([one.numbers for one in picked])
    rows = np.concatenate([one.rows for one in picked])
    chosen = np.linspace(0, len(rows) - 1, min(SAMPLE_QUERIES, len(rows))).astype(int)
    order = chosen[np.argsort(numbers[chosen])]
    total = sum(part.rows for group in layout.base for part in group)
    wanted = min(FIT_ROWS, knn.fit_rows(total))
    fit = []
    for group in layout.base:
        base = load(join.base, store, group).rows
        share = round(wanted * sum(part.rows for part in group) / max(1, total))
        fit.append(base[np.linspace(0, len(base) - 1, min(share, len(base))).astype(int)])
    arrays = {"numbers": numbers[order], "rows": rows[order], "fit": np.concatenate(fit)}
    save_arrays(store, join.setup("sample"), **arrays)


def _by_cells(join: Join, layout: Layout, crew: Crew) -> dict[str, Any]:
    """Puts base and queries in buckets, and answers in each what is asked there."""
    store, uri = crew.store, crew.store.uri
    if not store.exists(join.setup("plan")):
        _fit_cells(join, layout, store)
    partition = partial(PartitionWorker, join, uri, layout)
    crew.work(join.stage, partial(join.path, "base"), _sizes(layout.base), partition)
    if not store.exists(join.setup("route")):
        _choose_way(join, store)
    plan = Plan.load(store, join.setup("route"))
    waves = _waves(join, layout, plan, store)
    for wave in waves:
        to = partial(join.path, "pairs", 1 + wave[0])
        have = {entry.path for entry in store.list(f"{join.folder}/pairs")}
        if {to(bucket) for bucket in range(plan.buckets)} <= have:
            continue
        sizes = [size for size in _sizes(layout.queries) if size[0] in wave]
        route = partial(RouteWorker, join, uri, layout)
        crew.work(join.stage, partial(join.path, "queries"), sizes, route)
        share = sum(images for _, images in sizes) // plan.buckets
        answer = partial(AnswerWorker, join, uri, layout, wave)
        crew.work(join.stage, to, [(bucket, share) for bucket in range(plan.buckets)], answer)
        _delete(store, f"{join.folder}/queries")
    facts = {"cells": len(plan.cells), "nprobe": plan.nprobe, "buckets": plan.buckets}
    return facts | {"waves": len(waves)}


def _fit_cells(join: Join, layout: Layout, store: Store) -> None:
    """Cells, and buckets of consecutive ones that hold about BUCKET_ROWS each."""
    fit = load_arrays(store, join.setup("sample"))["fit"]
    total = sum(part.rows for group in layout.base for part in group)
    cells = Cells.fit(fit, knn.cell_count(total), np.random.default_rng(join.seed))
    sizes = np.bincount(cells.assign(fit), minlength=len(cells)) * (total / max(1, len(fit)))
    bucket = (np.cumsum(sizes) - sizes) // BUCKET_ROWS
    edges = np.flatnonzero(np.r_[True, bucket[1:] != bucket[:-1]])
    Plan(cells, np.r_[edges, len(cells)]).save(store, join.setup("plan"))


def _choose_way(join: Join, store: Store) -> None:
    """In how many cells a query asks, by the sample's true neighbours."""
    plan = Plan.load(store, join.setup("plan"))
    table = best_of(_truth(join, store), join.k)
    sampled, rank = np.unique(column_numpy(table, "query"), return_inverse=True)
    table = table.filter(pa.array(join.what.telling(as_neighbours(table, sampled, join.k))[rank]))
    pairs = knn.Pairs(column_numpy(table, "query"), column_numpy(table, "cell"), rows_of(table))
    sample: Floats = load_arrays(store, join.setup("sample"))["rows"]
    try:
        cells, nprobe = knn.choose_nprobe(plan.cells, sample, pairs, join.what)
    except knn.RecallError as error:
        raise StoreError(
            f"{join.stage}: {error}; lower search.target_recall or raise search.exact_below"
        ) from None
    replace(plan, cells=cells, nprobe=nprobe).save(store, join.setup("route"))


def _truth(join: Join, store: Store) -> pa.Table:
    """The sample's neighbours in every chunk of the base; `query` is a position in the sample."""
    paths = sorted(entry.path for entry in store.list(f"{join.folder}/truth"))
    return pa.concat_tables([read_table(store, path) for path in paths])


def _waves(join: Join, layout: Layout, plan: Plan, store: Store) -> list[list[int]]:
    """The chunks of queries that are sent at once, by how many copies the sample would need."""
    sample: Floats = load_arrays(store, join.setup("sample"))["rows"]
    row, step = np.nonzero((way := plan.cells.way(sample, plan.nprobe)) != NONE)
    sent = np.unique(row * plan.buckets + plan.bucket_of(way[row, step]))
    copies = len(sent) / len(sample)
    row_bytes = 2 * sample.shape[1] + 8 + 4 * len(row) / len(sent)
    most = join.how.spill_bytes / (copies * row_bytes)
    waves: list[list[int]] = []
    filled = 0
    for number, images in _sizes(layout.queries):
        if not waves or filled + images > most:
            waves.append([])
            filled = 0
        waves[-1].append(number)
        filled += images
    return waves


def _recall(join: Join, store: Store) -> float:
    """Of the sample's true neighbours, the share that stands in the answers."""
    numbers: Ints = load_arrays(store, join.setup("sample"))["numbers"]
    truth = _truth(join, store).select(["query", "image", "cosine"])
    true = as_neighbours(truth, np.arange(len(numbers)), join.k)
    found = pa.concat_tables(
        table.filter(pa.array(np.isin(table["query"].to_numpy(), numbers)))
        for table in answers(join, store)
    )
    return knn.recall(as_neighbours(found, numbers, join.k), true, join.what.alike)
