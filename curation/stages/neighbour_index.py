"""The index of a base that searches ask in: its rows in cells, consecutive cells in buckets.

`cells.npz`  centroids, and the first cell of each bucket
`sample/*`   the rows of each chunk of the base on which cells are fitted
`base/*`     the rows of each chunk with their cells, a block a bucket

Searches of one base share it. While it is made, the true neighbours of a sample of each search's
queries are found too: that reads the whole base anyway.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from curation.algorithms import knn
from curation.algorithms.cells import Cells
from curation.algorithms.products import Floats
from curation.algorithms.visits import Rows
from curation.runtime.events import Events
from curation.runtime.executor import (
    Executor,
    Item,
    MakeWorker,
    Work,
    all_cores,
    map_parts,
    require_all,
)
from curation.runtime.store import Store, read_table
from curation.stages.neighbour_plan import Group, Join, Layout, Plan, Sample
from curation.stages.neighbour_workers import (
    PartitionWorker,
    SampleWorker,
    load_distinct,
    rows_of,
)
from curation.stages.tables import overlapped

BUCKET_ROWS = 262_144  # base rows answered together: 0.5 GB at 512 dimensions
BUCKET_CELLS = 8  # at least, on average: the largest cell is many times an average one
FIT_ROWS = 1 << 21  # base rows that cells are fitted on, in this process: 8.6 GB at 512 dimensions
SAMPLE_CHUNKS = 16  # at least, of whose rows the sampled queries are

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


@dataclass(frozen=True)
class Asking:
    """A search with its queries and its base in chunks."""

    join: Join
    layout: Layout


def sizes(groups: Sequence[Group]) -> list[tuple[int, int]]:
    """The number of each chunk, and its images."""
    return [(number, sum(part.rows for part in group)) for number, group in enumerate(groups)]


def cell_count(base_rows: int, queries: int) -> int:
    """Cells of a base for all queries of the searches that share it."""
    least = min(BUCKET_CELLS * base_rows // BUCKET_ROWS, base_rows // knn.ROWS_PER_CELL)
    return max(knn.cell_count(base_rows, queries), least)


def build(asking: Sequence[Asking], crew: Crew) -> None:
    """The index, and of each search the sample with its true neighbours."""
    join, layout, store = asking[0].join, asking[0].layout, crew.store
    if not store.exists(join.cells):
        _fit_cells(asking, crew)
    partition = partial(PartitionWorker, [one.join for one in asking], store.uri, layout)
    crew.work(join.stage, join.base_sent, sizes(layout.base), partition)


def draw_queries(one: Asking, store: Store) -> None:
    """Rows whose true neighbours will be found, evenly spaced over chunks and rows.

    Read twice, so that never more than one chunk of them is held.
    """
    join, chunks = one.join, one.layout.queries
    picked = chunks[:: max(1, len(chunks) // SAMPLE_CHUNKS)]
    counts = [len(load_distinct(join, store, chunk)[0]) for chunk in picked]
    ends = np.cumsum(counts)
    sampling = knn.Sampling.of(join.what, int(ends[-1]))
    chosen = np.linspace(0, ends[-1] - 1, sampling.queries).astype(int)
    numbers, rows = [], []
    for chunk, count, end in zip(picked, counts, ends, strict=True):
        here = chosen[(chosen >= end - count) & (chosen < end)] - (end - count)
        queries, _ = load_distinct(join, store, chunk)
        numbers.append(queries.numbers[here])
        rows.append(queries.vectors[here])
    number, row = np.concatenate(numbers), np.concatenate(rows)
    order = np.argsort(number)
    Sample(Rows(row[order], number[order]), sampling).save(join, store)


def sample_base(one: Asking, cells: int, crew: Crew) -> None:
    """Publishes as many rows of the base as so many cells are fitted on, evenly spaced."""
    join, chunks = one.join, sizes(one.layout.base)
    wanted = min(FIT_ROWS, knn.fit_rows(sum(images for _, images in chunks), cells))
    worker = partial(SampleWorker, join, crew.store.uri, one.layout, wanted)
    crew.work(join.stage, join.sample_of_base, chunks, worker)


def _cells_of(asking: Sequence[Asking]) -> int:
    queries = sum(images for one in asking for _, images in sizes(one.layout.queries))
    return cell_count(sum(images for _, images in sizes(asking[0].layout.base)), queries)


def read_sample(one: Asking, store: Store) -> Floats:
    """The published rows of the base (n, D)."""
    paths = [one.join.sample_of_base(number) for number in range(len(one.layout.base))]
    tables = overlapped(paths, partial(read_table, store))
    return np.concatenate([rows_of(table) for _, table in tables])


def _fit_cells(asking: Sequence[Asking], crew: Crew) -> None:
    """Cells, and buckets of consecutive ones that hold about BUCKET_ROWS each."""
    one, count = asking[0], _cells_of(asking)
    sample_base(one, count, crew)
    fit = read_sample(one, crew.store)
    total = sum(images for _, images in sizes(one.layout.base))
    with all_cores():
        cells = Cells.fit(fit, count, np.random.default_rng(one.join.seed))
        cell = cells.assign(fit)
    held = np.bincount(cell, minlength=len(cells)) * (total / max(1, len(fit)))
    bucket = (np.cumsum(held) - held) // BUCKET_ROWS
    edges = np.flatnonzero(np.r_[True, bucket[1:] != bucket[:-1]])
    Plan(cells, np.r_[edges, len(cells)]).save(crew.store, one.join.cells)
