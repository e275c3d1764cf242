"""The search that dedup and retrieve share: for every query the nearest images of a base table.

Small bases are compared exactly. Larger ones are cut in slabs; each slab is indexed in one worker's
memory and answers all queries, then the slabs' answers are merged. Memory a worker: one slab.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from curation.algorithms.knn import NONE, Floats, Ints, Neighbours, SlabIndex, exact_block, recall
from curation.runtime.events import Events
from curation.runtime.executor import Counts, Executor, Item, Work, map_parts, require_all
from curation.runtime.store import Store, StoreError, open_store, read_table, write_table
from curation.schema import NEIGHBOURS
from curation.stages.tables import Part, VectorView

CHUNK_ROWS = 16_384  # queries answered together
SLAB_ROWS = 250_000  # base rows indexed together: 0.5 GB at 512 dimensions
TUNE_ROWS = 256
RECALL_ROWS = 1000


@dataclass(frozen=True)
class Join:
    """One search. Answers go to `folder`, a file a chunk of queries.

    `itself`: the queries are in the base too and must not find themselves.
    """

    stage: str
    folder: str
    queries: VectorView
    base: VectorView
    k: int
    min_cosine: float
    itself: bool
    exact_below: int
    target_recall: float
    seed: int


def chunks(parts: Sequence[Part], rows: int) -> list[tuple[Part, ...]]:
    """Consecutive parts in groups of about `rows` images."""
    groups: list[list[Part]] = []
    filled = rows
    for part in parts:
        if filled + part.rows > rows:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += part.rows
    return [tuple(group) for group in groups]


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
    if not store.exists(summary_path):
        summary = _search(join, query_parts, base_parts, store, executor, events)
        store.write(summary_path, json.dumps(summary).encode())
    for name in ("slab", "sample"):  # only now: a search that was killed needs them to go on
        for entry in list(store.list(f"{join.folder}/{name}")):
            store.delete(entry.path)
    answered: dict[str, Any] = json.loads(store.read(summary_path))
    return answered


def _search(
    join: Join,
    query_parts: Sequence[Part],
    base_parts: Sequence[Part],
    store: Store,
    executor: Executor,
    events: Events,
) -> dict[str, Any]:
    query_chunks = chunks(query_parts, CHUNK_ROWS)
    slabs = chunks(base_parts, SLAB_ROWS)
    if sum(part.rows for part in base_parts) <= join.exact_below:
        have = _have(store, join.folder)
        items = [_item(join, "answers", i, group) for i, group in enumerate(query_chunks)]
        worker = partial(ExactWorker, join, store.uri, tuple(base_parts))
        result = map_parts(
            Work(join.stage, items, lambda i: _path(join, *i.payload[:2]) in have, worker),
            executor,
            events,
        )
        require_all(result, join.stage)
        return {"method": "exact", "recall": 1.0}
    return _search_slabs(join, query_chunks, slabs, store, executor, events)


def answers(join: Join, store: Store) -> Iterator[pa.Table]:
    """The answers, a table a chunk, in order of the queries."""
    for entry in sorted(store.list(f"{join.folder}/answers"), key=lambda entry: entry.path):
        yield read_table(store, entry.path)


def _search_slabs(
    join: Join,
    query_chunks: list[tuple[Part, ...]],
    slabs: list[tuple[Part, ...]],
    store: Store,
    executor: Executor,
    events: Events,
) -> dict[str, Any]:
    have = _have(store, join.folder)
    merged = [_item(join, "answers", i, group) for i, group in enumerate(query_chunks)]
    open_chunks = [i for i in merged if _path(join, *i.payload[:2]) not in have]
    items = [_item(join, "slab", i, slab) for i, slab in enumerate(slabs)]
    result = map_parts(
        Work(
            join.stage,
            items,
            lambda i: not open_chunks or _slab_paths(join, i.payload[1], len(query_chunks)) <= have,
            partial(SlabWorker, join, store.uri, tuple(query_chunks)),
        ),
        executor,
        events,
    )
    require_all(result, join.stage)
    merge = partial(MergeWorker, join, store.uri, len(slabs))
    finished = map_parts(
        Work(join.stage, merged, lambda i: _path(join, *i.payload[:2]) in have, merge),
        executor,
        events,
    )
    require_all(finished, join.stage)
    measured = recall(*_sampled(join, store))
    if measured < join.target_recall:
        raise StoreError(
            f"{join.stage}: the search reached recall {measured:.4f} on a sample, below"
            f" search.target_recall = {join.target_recall}; lower it or raise search.exact_below"
        )
    return {"method": "ivf", "slabs": len(slabs), "recall": measured}


def _item(join: Join, kind: str, number: int, parts: tuple[Part, ...]) -> Item:
    images = sum(part.rows for part in parts)
    return Item(f"{join.folder}/{kind}/{number}", images, (kind, number, parts))


def _path(join: Join, kind: str, number: int) -> str:
    return f"{join.folder}/{kind}/{number:06d}.parquet"


def _slab_paths(join: Join, slab: int, query_chunks: int) -> set[str]:
    """A slab's answers to every chunk of queries; its sample is written before them."""
    folder = f"{join.folder}/slab/{slab:06d}"
    return {f"{folder}/{number:06d}.parquet" for number in range(query_chunks)}


def _have(store: Store, folder: str) -> set[str]:
    return {entry.path for entry in store.list(folder)}


def _load(view: VectorView, store: Store, parts: Sequence[Part]) -> tuple[Ints, Floats]:
    loaded = [view.load(store, part) for part in parts]
    return np.concatenate([n for n, _ in loaded]), np.concatenate([v for _, v in loaded])


def _nearest(join: Join, found: Neighbours, numbers: Ints, k: int) -> Neighbours:
    """Drops the query itself, found among its own neighbours."""
    if join.itself:
        mine = found.number == numbers[:, None]
        found.cosine[mine], found.number[mine] = -np.inf, NONE
        found = found.merge(Neighbours.empty(len(numbers), 0))
    return Neighbours(found.cosine[:, :k], found.number[:, :k])


def _write(join: Join, store: Store, path: str, numbers: Ints, found: Neighbours) -> int:
    """Publishes neighbours above the threshold as (query, image, cosine) rows."""
    row, column = np.nonzero((found.number != NONE) & (found.cosine > join.min_cosine))
    arrays = [numbers[row], found.number[row, column], found.cosine[row, column]]
    write_table(store, path, pa.Table.from_arrays([pa.array(a) for a in arrays], schema=NEIGHBOURS))
    return len(row)


class ExactWorker:
    """Compares a chunk of queries with the whole base, a part at a time."""

    def __init__(self, join: Join, run_uri: str, base_parts: tuple[Part, ...]) -> None:
        self._join, self._store, self._base = join, open_store(run_uri), base_parts

    def __call__(self, item: tuple[str, int, tuple[Part, ...]]) -> Counts:
        join, (kind, number, parts) = self._join, item
        numbers, queries = _load(join.queries, self._store, parts)
        k = join.k + join.itself
        found = Neighbours.empty(len(queries), k)
        for part in self._base:
            base_numbers, base = join.base.load(self._store, part)
            found = found.merge(exact_block(queries, base, base_numbers, k))
        found = _nearest(join, found, numbers, join.k)
        return {"pairs": _write(join, self._store, _path(join, kind, number), numbers, found)}


class SlabWorker:
    """Indexes one slab and answers all queries from it, plus a sample of them exactly."""

    def __init__(
        self, join: Join, run_uri: str, query_chunks: tuple[tuple[Part, ...], ...]
    ) -> None:
        self._join, self._store, self._chunks = join, open_store(run_uri), query_chunks

    def __call__(self, item: tuple[str, int, tuple[Part, ...]]) -> Counts:
        import faiss

        faiss.omp_set_num_threads(1)
        join, (_, slab, parts) = self._join, item
        numbers, base = _load(join.base, self._store, parts)
        if not len(base):
            return {}
        index = SlabIndex(base, numbers, join.seed + slab)
        k = join.k + join.itself
        sample_numbers, sample = self._sample()
        # Aim above the target: the sample that tunes is small, the one that judges is not.
        aim = 1 - (1 - join.target_recall) / 2
        nprobe = index.tune(sample[:: max(1, len(sample) // TUNE_ROWS)], k, aim)
        truth = _nearest(join, exact_block(sample, base, numbers, k), sample_numbers, join.k)
        _write(join, self._store, _path(join, "sample", slab), sample_numbers, truth)
        have = _have(self._store, f"{join.folder}/slab")
        for number, chunk in enumerate(self._chunks):
            path = f"{join.folder}/slab/{slab:06d}/{number:06d}.parquet"
            if path not in have:
                query_numbers, queries = _load(join.queries, self._store, chunk)
                found = _nearest(join, index.search(queries, k), query_numbers, join.k)
                _write(join, self._store, path, query_numbers, found)
        return {"nprobe": nprobe}

    def _sample(self) -> tuple[Ints, Floats]:
        """The same queries for every slab: evenly spaced over chunks and rows."""
        step = max(1, len(self._chunks) // 16)
        picked = [_load(self._join.queries, self._store, chunk) for chunk in self._chunks[::step]]
        numbers = np.concatenate([n for n, _ in picked])
        rows = np.concatenate([v for _, v in picked])
        stride = max(1, len(rows) // RECALL_ROWS)
        return numbers[::stride], rows[::stride]


class MergeWorker:
    """Merges the slabs' answers for one chunk of queries."""

    def __init__(self, join: Join, run_uri: str, slabs: int) -> None:
        self._join, self._store, self._slabs = join, open_store(run_uri), slabs

    def __call__(self, item: tuple[str, int, tuple[Part, ...]]) -> Counts:
        _, number, _ = item
        tables = [
            read_table(self._store, path)
            for path in (
                f"{self._join.folder}/slab/{slab:06d}/{number:06d}.parquet"
                for slab in range(self._slabs)
            )
            if self._store.exists(path)
        ]
        best = _best(pa.concat_tables([NEIGHBOURS.empty_table(), *tables]), self._join.k)
        write_table(self._store, _path(self._join, "answers", number), best)
        return {"pairs": len(best)}


def _best(table: pa.Table, k: int) -> pa.Table:
    """The k best rows of each query, by falling cosine."""
    query, image = (table[name].to_numpy() for name in ("query", "image"))
    order = np.lexsort((image, -table["cosine"].to_numpy(), query))
    query = query[order]
    rank = np.arange(len(query)) - np.searchsorted(query, query)
    return table.take(pa.array(order[rank < k]))


def _sampled(join: Join, store: Store) -> tuple[Neighbours, Neighbours]:
    """The sample's neighbours as they were found, and the true ones, as matrices."""
    paths = sorted(entry.path for entry in store.list(f"{join.folder}/sample"))
    tables = [NEIGHBOURS.empty_table(), *(read_table(store, path) for path in paths)]
    truth = _best(pa.concat_tables(tables), join.k)
    wanted = np.unique(truth["query"].to_numpy())
    picked = [NEIGHBOURS.empty_table()]
    for table in answers(join, store):
        picked.append(table.filter(pa.array(np.isin(table["query"].to_numpy(), wanted))))
    return _matrix(pa.concat_tables(picked), wanted, join.k), _matrix(truth, wanted, join.k)


def _matrix(table: pa.Table, queries: Ints, k: int) -> Neighbours:
    found = Neighbours.empty(len(queries), k)
    row = np.searchsorted(queries, table["query"].to_numpy())
    order = np.argsort(row, kind="stable")
    row = row[order]
    starts = np.searchsorted(row, row)
    column = np.arange(len(row)) - starts
    found.cosine[row, column] = table["cosine"].to_numpy()[order]
    found.number[row, column] = table["image"].to_numpy()[order]
    return found
