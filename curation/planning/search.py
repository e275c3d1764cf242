"""What a search for neighbours asks of a machine, step by step as in `stages/neighbours.py`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from curation.algorithms import cells as cell_search
from curation.algorithms import knn
from curation.planning.job import REQUESTS_A_TABLE, Job, Step
from curation.stages import neighbours

FIXED_ROW = 12  # bytes of an image's number and cell beside its vector
PAIR = 20  # bytes of two numbers and a cosine


@dataclass(frozen=True)
class Ask:
    """A search: so many queries in a base of rows of `dim`, in `nprobe` cells each."""

    name: str
    queries: int
    base: int
    dim: int
    nprobe: float
    itself: bool = False


def search(job: Job, ask: Ask) -> Iterator[Step]:
    """The steps of `neighbours.search`."""
    if ask.base <= job.recipe.search.exact_below:
        yield _compare_all(job, ask)
        return
    c, sent = job.c, Sent.of(job, ask)
    row, cells, axes = 2 * ask.dim, sent.cells, min(cell_search.AXES, ask.dim)
    to_cells = 2 * axes * (ask.dim + cells)  # FLOP a row
    load = row / c["load_bytes_per_s"]
    loads = job.parts(ask.base) * 2 * REQUESTS_A_TABLE
    fit = min(neighbours.FIT_ROWS, knn.fit_rows(ask.base))
    sweeps = sum(iterations for _, iterations in cell_search.ROUNDS) + 1
    yield Step(
        f"{ask.name}: fit cells",
        "driver",
        ask.base * load + sweeps * fit * to_cells / (c["cells_gflops"] * 1e9),
        read=ask.base * row,
        gets=loads,
        memory=2.0 * fit * ask.dim * 4,
    )
    truth = 2 * ask.dim * neighbours.SAMPLE_QUERIES / (c["exact_gflops"] * 1e9)
    yield Step(
        f"{ask.name}: put the base in cells",
        "workers",
        ask.base * (load + truth + to_cells / (c["cells_gflops"] * 1e9)) * c["search_overhead"],
        read=ask.base * row,
        written=ask.base * (row + FIXED_ROW),
        gets=loads,
        puts=2 * sent.base_chunks,
        items=sent.base_chunks,
        memory=sent.chunk_rows * ask.dim * 4 * 2.5 + cells * ask.dim * 4,
    )
    again = 1 + cell_search.FAR_ROWS
    yield Step(
        f"{ask.name}: send the queries",
        "workers",
        ask.queries * (load + again * to_cells / (c["cells_gflops"] * 1e9)) * c["search_overhead"],
        read=ask.queries * row,
        written=sent.copy_bytes,
        gets=job.parts(ask.queries) * 2 * REQUESTS_A_TABLE,
        puts=2 * sent.query_chunks,
        items=sent.query_chunks,
        memory=sent.chunk_rows * ask.dim * 8 * (1 + sent.copies),
    )
    received = sent.buckets * (sent.base_chunks * sent.waves + sent.query_chunks)
    met = ask.queries * sent.asked * c["rows_met"] * ask.base / cells
    yield Step(
        f"{ask.name}: answer",
        "workers",
        met * 2 * ask.dim / (c["search_gflops"] * 1e9) * c["search_overhead"]
        + received * c["table_s"],
        read=sent.waves * ask.base * (row + FIXED_ROW) + sent.copy_bytes,
        written=ask.queries * c["pairs_per_image"] * PAIR,
        gets=received * REQUESTS_A_TABLE,
        puts=sent.buckets * sent.waves,
        items=sent.buckets,
        memory=neighbours.BUCKET_ROWS * ask.dim * 6 + 0.5e9,
    )
    merged = sent.query_chunks * (sent.buckets * sent.waves + sent.query_chunks)
    yield Step(
        f"{ask.name}: merge",
        "workers",
        merged * c["table_s"],
        read=ask.queries * c["pairs_per_image"] * PAIR,
        written=ask.queries * c["pairs_per_image"] * PAIR,
        gets=merged * REQUESTS_A_TABLE,
        puts=sent.query_chunks,
        items=sent.query_chunks,
        memory=1e9,
    )


def _compare_all(job: Job, ask: Ask) -> Step:
    """Every chunk of queries with every part of the base."""
    c, row = job.c, 2 * ask.dim
    chunks, parts = math.ceil(ask.queries / neighbours.EXACT_ROWS), job.parts(ask.base)
    flop = 2.0 * ask.dim * ask.queries * ask.base
    tables = chunks * parts * 2 + job.parts(ask.queries) * 2
    read = (chunks * ask.base + ask.queries) * row
    return Step(
        f"{ask.name}: compare all",
        "workers",
        flop / (c["exact_gflops"] * 1e9) + tables * c["table_s"] + read / c["load_bytes_per_s"],
        read=read,
        gets=tables * REQUESTS_A_TABLE,
        puts=chunks,
        items=chunks,
        memory=neighbours.EXACT_ROWS * (ask.dim * 4 + 12 * 64),
    )


@dataclass(frozen=True)
class Sent:
    """What a search by cells sends: chunks to buckets, in waves of at most `spill_bytes`."""

    cells: int
    asked: float  # cells a query asks in
    copies: float  # of a query, one a bucket
    copy_bytes: float
    buckets: int
    waves: int
    base_chunks: int
    query_chunks: int
    chunk_rows: int

    @classmethod
    def of(cls, job: Job, ask: Ask) -> "Sent":
        cells = knn.cell_count(ask.base)
        far = cell_search.FAR_ROWS
        asked = min(cells, ask.nprobe * (1 + far * (cell_search.FAR_CELLS - 1)))
        buckets = math.ceil(ask.base / neighbours.BUCKET_ROWS)
        copies = min(buckets, 1 + (asked - 1) * job.c["apart"])
        sent = ask.queries * copies * (2 * ask.dim + 8 + 4 * asked / copies)
        waves = math.ceil(sent / job.recipe.search.spill_bytes)
        rows = neighbours.chunk_rows(ask.base), neighbours.chunk_rows(ask.queries)
        chunks = math.ceil(ask.base / rows[0]), math.ceil(ask.queries / rows[1])
        return cls(cells, asked, copies, sent, buckets, waves, *chunks, max(rows))
