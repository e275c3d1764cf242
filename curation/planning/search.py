"""What a search for neighbours asks of a machine, step by step as in `stages/neighbours.py`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from curation.algorithms import cells as cell_search
from curation.algorithms import knn, products
from curation.planning.job import BLOCK, TABLE, UPLOAD_PART, VECTORS, Job, Step
from curation.runtime.store import REQUESTS
from curation.stages import neighbour_index, neighbours

FIXED_ROW = 12  # bytes of an image's number and cell beside its vector
PAIR = 20  # bytes of two numbers and a cosine
BLOCK_BYTES = 900  # of an Arrow stream beside its rows
LOAD = VECTORS + TABLE  # requests for the vectors of a part and what tells which are wanted


@dataclass(frozen=True)
class Ask:
    """A search: so many queries in a base of rows of `dim`, in `nprobe` cells each."""

    name: str
    queries: int
    base: int
    dim: int
    nprobe: float
    itself: bool = False


def search(job: Job, *asks: Ask) -> Iterator[Step]:
    """The steps of `neighbours.search_all`: searches of one base, which is put in cells once."""
    if not asks:
        return
    if asks[0].base <= job.recipe.search.exact_below:
        yield from (_compare_all(job, ask) for ask in asks)
        return
    queries = sum(ask.queries for ask in asks)
    yield from _index(job, asks, Sent.of(job, asks[0], queries))
    for ask in asks:
        yield from _answers(job, ask, Sent.of(job, ask, queries))


def _index(job: Job, asks: Sequence[Ask], sent: "Sent") -> Iterator[Step]:
    """What all searches of a base need, and the truth of a sample of each."""
    c, ask = job.c, asks[0]
    row, name = 2 * ask.dim, "copies" if ask.itself else "the pool"
    load, to_cells = row / c["load_bytes_per_s"], _to_cells(ask, sent)
    parts, rows = job.parts(ask.base), neighbour_index.SAMPLE_CHUNKS * sent.query_rows
    sampled = 2 * sum(min(rows, ask.queries) for ask in asks)  # read twice
    fit = min(neighbour_index.FIT_ROWS, knn.fit_rows(ask.base, sent.cells))
    sweeps = sum(iterations for _, iterations in cell_search.ROUNDS) + 1
    yield Step(
        f"{name}: sample the queries",
        "driver",
        sampled * load + len(asks) * c["search_start_s"],
        read=sampled * row,
        gets=job.parts(sampled) * LOAD,
        together=REQUESTS,
        memory=sent.query_rows * ask.dim * 8,
    )
    yield Step(
        f"{name}: sample the base",
        "workers",
        ask.base * load,
        read=ask.base * row,
        written=fit * row,
        gets=parts * LOAD,
        puts=sent.base_chunks,
        items=sent.base_chunks,
        together=REQUESTS,
        memory=sent.base_rows * ask.dim * 8,
    )
    yield Step(
        f"{name}: fit cells",
        "node",
        sweeps * fit * to_cells / (c["cells_gflops"] * 1e9) * c["search_overhead"],
        read=fit * row,
        gets=sent.base_chunks * TABLE,
        items=math.ceil(fit / products.TILE_ROWS),
        together=REQUESTS,
        memory=2.0 * fit * ask.dim * 4,
    )
    truth = len(asks) * 2 * ask.dim * knn.SAMPLE_QUERIES / (c["exact_gflops"] * 1e9)
    yield Step(
        f"{name}: put the base in cells",
        "workers",
        ask.base * (load + truth + to_cells / (c["cells_gflops"] * 1e9)) * c["search_overhead"]
        + sent.base_chunks * sent.buckets * c["send_block_s"],
        read=ask.base * row,
        written=ask.base * (row + FIXED_ROW) + sent.base_chunks * sent.buckets * BLOCK_BYTES,
        gets=parts * LOAD,
        puts=(1 + len(asks)) * sent.base_chunks + ask.base * row / UPLOAD_PART,
        items=sent.base_chunks,
        together=REQUESTS,
        memory=sent.base_rows * ask.dim * 4 * 2.5 + sent.cells * ask.dim * 4,
    )


def _answers(job: Job, ask: Ask, sent: "Sent") -> Iterator[Step]:
    c, row = job.c, 2 * ask.dim
    load = row / c["load_bytes_per_s"]
    blocks = sent.query_chunks * sent.buckets
    routing = _to_cells(ask, sent) / (c["cells_gflops"] * 1e9)
    yield Step(
        f"{ask.name}: send the queries",
        "workers",
        ask.queries * (load + routing) * c["search_overhead"] + blocks * c["send_block_s"],
        read=ask.queries * row,
        written=sent.copy_bytes + blocks * BLOCK_BYTES,
        gets=job.parts(ask.queries) * LOAD,
        puts=2 * sent.query_chunks + sent.copy_bytes / UPLOAD_PART,
        items=sent.query_chunks,
        together=REQUESTS,
        memory=sent.query_rows * ask.dim * 8 * (1 + sent.copies),
    )
    received = sent.buckets * (sent.base_chunks * sent.waves + sent.query_chunks)
    met = ask.queries * sent.asked * c["rows_met"] * ask.base / sent.cells
    pairs = ask.queries * c["pairs_per_image"] * PAIR
    yield Step(
        f"{ask.name}: answer",
        "workers",
        met * 2 * ask.dim / (c["search_gflops"] * 1e9) * c["search_overhead"]
        + received * c["receive_block_s"]
        + blocks * c["send_block_s"],
        read=sent.waves * ask.base * (row + FIXED_ROW) + sent.copy_bytes + received * BLOCK_BYTES,
        written=pairs + blocks * BLOCK_BYTES,
        gets=received * BLOCK,
        puts=sent.buckets * sent.waves,
        items=sent.buckets,
        together=REQUESTS,
        memory=neighbour_index.BUCKET_ROWS * ask.dim * 6 + 0.5e9,
    )
    merged = blocks * sent.waves
    yield Step(
        f"{ask.name}: merge",
        "workers",
        merged * c["receive_block_s"] + sent.query_chunks * c["table_s"],
        read=pairs + merged * BLOCK_BYTES,
        written=pairs,
        gets=merged * BLOCK + sent.query_chunks * TABLE,
        puts=sent.query_chunks,
        items=sent.query_chunks,
        together=REQUESTS,
        memory=1e9,
    )
    tables, files = sent.base_chunks + sent.query_chunks, 4 * sent.base_chunks + sent.buckets
    yield Step(
        f"{ask.name}: recall",
        "driver",
        tables * c["table_s"] + ask.queries * c["pairs_per_image"] * c["table_row_s"],
        read=pairs,
        gets=tables * TABLE,
        puts=files,  # which are deleted
        together=REQUESTS,
    )


def _to_cells(ask: Ask, sent: "Sent") -> float:
    """FLOP to find a row's nearest cells."""
    return 2.0 * ask.dim * sent.cells


def _compare_all(job: Job, ask: Ask) -> Step:
    """Every chunk of queries with every part of the base."""
    c, row = job.c, 2 * ask.dim
    chunks, parts = math.ceil(ask.queries / neighbours.EXACT_ROWS), job.parts(ask.base)
    flop = 2.0 * ask.dim * ask.queries * ask.base
    tables = chunks * parts * 2 + job.parts(ask.queries) * 2
    gets = (chunks * parts + job.parts(ask.queries)) * LOAD
    read = (chunks * ask.base + ask.queries) * row
    return Step(
        f"{ask.name}: compare all",
        "workers",
        flop / (c["exact_gflops"] * 1e9) + tables * c["table_s"] + read / c["load_bytes_per_s"],
        read=read,
        gets=gets,
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
    base_rows: int  # of a chunk
    query_rows: int

    @classmethod
    def of(cls, job: Job, ask: Ask, queries: int) -> "Sent":
        """Of one of the searches of a base, which together have so many queries."""
        cells = neighbour_index.cell_count(ask.base, queries)
        asked = min(cells, ask.nprobe)
        buckets = math.ceil(ask.base / neighbour_index.BUCKET_ROWS)
        copies = min(buckets, 1 + (asked - 1) * job.c["apart"])
        sent = ask.queries * copies * (2 * ask.dim + 8 + 4 * asked / copies)
        waves = math.ceil(sent / job.recipe.search.spill_bytes)
        rows = neighbours.chunk_rows(ask.base), neighbours.chunk_rows(ask.queries)
        chunks = math.ceil(ask.base / rows[0]), math.ceil(ask.queries / rows[1])
        return cls(cells, asked, copies, sent, buckets, waves, *chunks, *rows)
