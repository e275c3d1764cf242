"""The workers of `neighbours.search`: each turns one item into one published file."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.algorithms import knn
from curation.algorithms.best import Best, Neighbours
from curation.algorithms.equal import first_of_equal
from curation.algorithms.ivfpq import IvfPq
from curation.algorithms.products import NONE, Floats, Ints
from curation.algorithms.search import search
from curation.algorithms.visits import Base, Rows, Twins, Visits
from curation.runtime.executor import Counts
from curation.runtime.store import REQUESTS, Store, open_store, read_table, write_table
from curation.schema import NEIGHBOURS
from curation.stages.exchange import receive_each, send
from curation.stages.neighbour_plan import Join, Layout, Plan, Sample
from curation.stages.tables import Part, VectorView, column_bytes, column_numpy, overlapped

MERGE_ROWS = 1 << 24  # pairs held before the best of them are chosen
HEAP_BYTES = 1 << 28  # what the best of the queries answered together may take


def load(view: VectorView, store: Store, parts: Sequence[Part]) -> Rows:
    """The numbers (n,) and unit rows (n, D) of some parts."""
    loaded = [found for _, found in overlapped(parts, partial(view.load, store))]
    return Rows(np.concatenate([v for _, v in loaded]), np.concatenate([n for n, _ in loaded]))


def load_distinct(join: Join, store: Store, parts: Sequence[Part]) -> tuple[Rows, pa.Table]:
    """Rows; in a self-join of equal rows the first alone, and the others as its neighbours."""
    found = load(join.queries, store, parts)
    if not join.itself or not len(found):
        return found, NEIGHBOURS.empty_table()
    first = first_of_equal(found.vectors)
    stays = first == np.arange(len(first))
    again, first = np.flatnonzero(~stays), first[~stays]
    cosine = np.einsum("nd,nd->n", found.vectors[again], found.vectors[again])
    pairs = pair_table(found.numbers[again], found.numbers[first], cosine)
    return Rows(found.vectors[stays], found.numbers[stays]), pairs


def pair_table(query: Ints, image: Ints, cosine: Floats) -> pa.Table:
    columns = [pa.array(query), pa.array(image), pa.array(cosine.astype(np.float32))]
    return pa.Table.from_arrays(columns, schema=NEIGHBOURS)


def pairs_of(numbers: Ints, found: Neighbours) -> pa.Table:
    """The neighbours of the images `numbers` (n,) as rows, nearest first."""
    row, column = np.nonzero(found.number != NONE)
    return pair_table(numbers[row], found.number[row, column], found.score[row, column])


def vectors(rows: Floats) -> pa.Array:
    """Rows (n, D) as fp16, in which they were stored."""
    data = pa.py_buffer(np.ascontiguousarray(rows.astype(np.float16)).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(2 * rows.shape[1]), len(rows), [None, data]
    )


def rows_of(table: pa.Table) -> Floats:
    rows: Floats = column_bytes(table, "vector").view(np.float16).astype(np.float32)
    return rows


def best_of(table: pa.Table, k: int) -> pa.Table:
    """The k best rows of each query, nearest first; the same pair counts once."""
    query, image = column_numpy(table, "query"), column_numpy(table, "image")
    order = np.lexsort((image, -table["cosine"].to_numpy(), query))
    query, image = query[order], image[order]
    new = np.ones(len(order), bool)
    new[1:] = (query[1:] != query[:-1]) | (image[1:] != image[:-1])
    order, query = order[new], query[new]
    rank = np.arange(len(query)) - np.searchsorted(query, query)
    return table.take(pa.array(order[rank < k]))


class ExactWorker:
    """Compares a chunk of queries with the whole base, a part at a time."""

    def __init__(self, join: Join, run_uri: str, layout: Layout) -> None:
        self._join, self._store, self._layout = join, open_store(run_uri), layout

    def __call__(self, chunk: int) -> Counts:
        join, store = self._join, self._store
        queries = load(join.queries, store, self._layout.queries[chunk])
        base = (load(join.base, store, [part]) for group in self._layout.base for part in group)
        found = pairs_of(queries.numbers, knn.exact(queries, base, join.what))
        write_table(store, join.path("answers", chunk), found)
        return {"pairs": len(found)}


class SampleWorker:
    """Publishes rows of a chunk of the base, evenly spaced: its share of all that are wanted."""

    def __init__(self, join: Join, run_uri: str, layout: Layout, wanted: int) -> None:
        self._join, self._store, self._layout = join, open_store(run_uri), layout
        self._wanted = wanted  # of the whole base

    def __call__(self, chunk: int) -> Counts:
        images = [sum(part.rows for part in parts) for parts in self._layout.base]
        share = round(self._wanted * images[chunk] / max(1, sum(images)))
        rows = load(self._join.base, self._store, self._layout.base[chunk]).vectors
        wanted = min(share, len(rows))
        taken = rows[np.linspace(0, len(rows) - 1, wanted).astype(int)]
        table = pa.table({"vector": vectors(taken)})
        write_table(self._store, self._join.sample_of_base(chunk), table)
        return {"images": len(taken)}


class PartitionWorker:
    """Sends the rows of a chunk of the base to their buckets; compares all samples with them."""

    def __init__(self, joins: Sequence[Join], run_uri: str, layout: Layout) -> None:
        self._joins, self._store, self._layout = joins, open_store(run_uri), layout
        self._plan = Plan.load(self._store, joins[0].cells)
        self._samples = [Sample.load(join, self._store) for join in joins]

    def __call__(self, chunk: int) -> Counts:
        join, store, plan = self._joins[0], self._store, self._plan
        if join.itself:
            rows, _ = load_distinct(join, store, self._layout.base[chunk])
        else:
            rows = load(join.base, store, self._layout.base[chunk])
        cell = plan.cells.assign(rows.vectors)
        table = pa.table(
            {"image": rows.numbers, "cell": cell.astype(np.int32), "vector": vectors(rows.vectors)}
        )
        for one, sample in zip(self._joins, self._samples, strict=True):
            self._write_truth(one, sample, chunk, rows, cell)
        if join.itself:
            stays = knn.standing(rows.vectors, cell, len(plan.cells), join.what)
            table, cell = table.filter(pa.array(stays)), cell[stays]
        send(store, join.base_sent(chunk), table, plan.bucket_of(cell), plan.buckets)
        return {"images": len(rows)}

    def _write_truth(self, join: Join, sample: Sample, chunk: int, rows: Rows, cell: Ints) -> None:
        """What the sample's true neighbours among the rows are, with their cells and vectors."""
        truth = pairs_of(np.arange(len(sample.queries)), sample.truth(join, rows, chunk))
        at = np.searchsorted(rows.numbers, column_numpy(truth, "image"))
        truth = truth.append_column("cell", pa.array(cell[at]))
        truth = truth.append_column("vector", vectors(rows.vectors[at]))
        write_table(self._store, join.path("truth", chunk), truth)


class RouteWorker:
    """Sends the queries of a chunk to the buckets in which they ask."""

    def __init__(self, join: Join, run_uri: str, layout: Layout) -> None:
        self._join, self._store, self._layout = join, open_store(run_uri), layout
        self._plan = Plan.load(self._store, join.setup("route"))

    def __call__(self, chunk: int) -> Counts:
        join, store, plan = self._join, self._store, self._plan
        queries, equal = load_distinct(join, store, self._layout.queries[chunk])
        write_table(store, join.path("equal", chunk), equal)
        way = plan.cells.way(queries.vectors, plan.reach)
        row, step = np.nonzero(way != NONE)
        cell = way[row, step]
        bucket = plan.bucket_of(cell)
        order = np.lexsort((row, bucket))
        row, cell, bucket = row[order], cell[order], bucket[order]
        first = np.ones(len(row), bool)
        first[1:] = (row[1:] != row[:-1]) | (bucket[1:] != bucket[:-1])
        starts = np.flatnonzero(first)
        offsets = pa.array(np.r_[starts, len(row)].astype(np.int32))
        table = pa.table(
            {
                "image": queries.numbers[row[starts]],
                "cells": pa.ListArray.from_arrays(offsets, pa.array(cell.astype(np.int32))),
                "vector": vectors(queries.vectors[row[starts]]),
            }
        )
        send(store, join.sent("queries", chunk), table, bucket[starts], plan.buckets)
        return {"copies": len(table)}


class AnswerWorker:
    """Reads one bucket of the base once and answers every query that asks in it."""

    def __init__(self, join: Join, run_uri: str, layout: Layout, wave: Sequence[int]) -> None:
        self._join, self._store, self._layout = join, open_store(run_uri), layout
        self._plan = Plan.load(self._store, join.setup("route"))
        self._wave = wave

    def __call__(self, bucket: int) -> Counts:
        join, store = self._join, self._store
        first, last = (int(edge) for edge in self._plan.edges[bucket : bucket + 2])
        sent = [join.base_sent(chunk) for chunk in range(len(self._layout.base))]
        table = pa.concat_tables(receive_each(store, sent, bucket))
        cell = column_numpy(table, "cell") - first
        rows = Rows(rows_of(table), column_numpy(table, "image"))
        base = Base.of(rows, cell, last - first)
        twins = None
        if join.itself:
            best = Best(len(rows), join.k, join.min_cosine)
            twins = Twins(best, np.arange(len(rows)))
        found = [NEIGHBOURS.empty_table()]
        sent = [join.sent("queries", chunk) for chunk in self._wave]
        ahead = min(REQUESTS, 1 + self._plan.buckets // 16)  # few buckets are sent large blocks
        for asked in receive_each(store, sent, bucket, ahead):
            step = max(1, HEAP_BYTES // (12 * join.k))
            for start in range(0, len(asked), step):
                found.append(self._answer(asked.slice(start, step), base, first, twins))
        if twins:
            found.append(pairs_of(rows.numbers, twins.best.sorted()))
        pairs = pa.concat_tables(found)
        to = self._layout.chunk_of(column_numpy(pairs, "query"))
        path = join.sent("pairs", self._wave[0], bucket)
        send(store, path, pairs, to, len(self._layout.queries))
        return {"pairs": len(pairs)}

    def _answer(self, asked: pa.Table, base: Base, first: int, twins: Twins | None) -> pa.Table:
        join, cells = self._join, asked["cells"].combine_chunks()
        lengths = np.diff(cells.offsets.to_numpy())
        query = np.repeat(np.arange(len(asked)), lengths)
        place = np.arange(len(query)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        way = np.full((len(asked), lengths.max(initial=0)), NONE)
        way[query, place] = cells.flatten().to_numpy() - first
        queries = Rows(rows_of(asked), column_numpy(asked, "image"))
        best = Best(len(asked), join.k, join.min_cosine)
        for turn in join.what.turns:
            visits = Visits.of(way[:, turn], len(base.starts) - 1)
            search(queries, visits, base, best, twins)
        return pairs_of(queries.numbers, best.sorted())


class SlabWorker:
    """Builds an IVF-PQ index over one slab of the base and answers all queries from it."""

    def __init__(self, join: Join, run_uri: str, layout: Layout) -> None:
        self._join, self._store, self._layout = join, open_store(run_uri), layout
        self._sample = Sample.load(join, self._store)
        paths = [join.sample_of_base(number) for number in range(len(layout.base))]
        self._training = np.concatenate([rows_of(read_table(self._store, path)) for path in paths])

    def __call__(self, slab: int) -> Counts:
        join, store = self._join, self._store
        base = load(join.base, store, self._layout.base[slab])
        sample = self._sample.queries
        truth = pairs_of(np.arange(len(sample)), self._sample.truth(join, base, slab))
        write_table(store, join.path("truth", slab), truth)
        trained = IvfPq(self._training, target_recall=join.how.target_recall, seed=join.seed)
        k = join.k + join.itself
        index = trained.over(base.vectors, base.numbers, sample.vectors, k)
        found = [NEIGHBOURS.empty_table()]
        for chunk in self._layout.queries:
            queries = load(join.queries, store, chunk)
            near = index.search(queries.vectors)
            pairs = pairs_of(queries.numbers, near)
            keep = pc.not_equal(pairs["query"], pairs["image"]) if join.itself else None
            found.append(pairs.filter(keep) if join.itself else pairs)
        pairs = pa.concat_tables(found)
        pairs = pairs.filter(pc.greater(pairs["cosine"], join.min_cosine))
        to = self._layout.chunk_of(column_numpy(pairs, "query"))
        send(store, join.sent("pairs", 0, slab), pairs, to, len(self._layout.queries))
        return {"pairs": len(pairs)}


class MergeWorker:
    """Gathers what the buckets have found for one chunk of queries."""

    def __init__(self, join: Join, run_uri: str, paths: Sequence[str]) -> None:
        self._join, self._store, self._paths = join, open_store(run_uri), paths

    def __call__(self, chunk: int) -> Counts:
        found = NEIGHBOURS.empty_table()
        if self._join.how.method == "cells":
            found = read_table(self._store, self._join.path("equal", chunk))
        for pairs in receive_each(self._store, self._paths, chunk):
            found = pa.concat_tables([found, pairs])
            if len(found) > MERGE_ROWS:
                found = best_of(found, self._join.k)
        found = best_of(found, self._join.k)
        write_table(self._store, self._join.path("answers", chunk), found)
        return {"pairs": len(found)}


def as_neighbours(pairs: pa.Table, queries: Ints, k: int) -> Neighbours:
    """The k best of each of `queries` (n,), rising, among rows of pairs."""
    table = best_of(pairs, k)
    none = np.full((len(queries), k), NONE)
    best = Neighbours(np.full(none.shape, -np.inf, np.float32), none)
    query = column_numpy(table, "query")
    column = np.arange(len(query)) - np.searchsorted(query, query)
    row = np.searchsorted(queries, query)
    best.score[row, column] = table["cosine"].to_numpy()
    best.number[row, column] = column_numpy(table, "image")
    return best
