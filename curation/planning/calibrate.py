"""`curate calibrate`: measures on this machine what the planner counts with, on one core each.

The tables of every stage by small runs of the pipeline itself, the models of the recipe on
pictures, and the products of searches and k-means on made-up vectors. About two minutes,
and as much again where nothing has been compiled yet.
"""

import hashlib
import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from curation import pipeline
from curation.algorithms import kmeans, knn
from curation.algorithms.best import Best
from curation.algorithms.cells import Reach
from curation.algorithms.groups import Groups
from curation.algorithms.products import Floats
from curation.algorithms.sampling import draw_by_cluster
from curation.algorithms.search import search
from curation.algorithms.visits import Base, Rows, Visits
from curation.images.decode import Limits, decode
from curation.images.effort import copy_effort, semantic_effort
from curation.images.sources import scan_tar
from curation.planning import constants, small_runs
from curation.planning.composition import Sizes
from curation.planning.job import Job
from curation.planning.pictures import pictures
from curation.planning.search import Ask
from curation.planning.search import search as count_search
from curation.recipe import Recipe
from curation.runtime.executor import one_thread
from curation.runtime.store import open_store, read_table, write_table
from curation.stages.cluster_tables import binary, slice_table
from curation.stages.exchange import receive, send
from curation.stages.neighbour_workers import rows_of
from curation.stages.report_examples import Showing, thumbnail

DIM = 384
ROWS = 40_000  # made-up vectors
QUERIES = 1024
SEARCHED = (40_000, 160_000)  # of them, in whole searches
BLOCKS = 500  # that one worker sends
ARCHIVED = 2000  # images of an archive that is scanned
SHOWN = 64  # pictures that are made small
SECONDS, RUNS = 2.0, 20  # for one figure, at most


def measure(recipe: Recipe, folder: str | None, say: Callable[[str], None]) -> dict[str, float]:
    """Constants by name. `folder` holds pictures like those that will be embedded.

    Processor time, except for writing: what else the machine does meanwhile counts not.
    """
    one_thread()
    found: dict[str, float] = {}
    steps: dict[str, Callable[[], dict[str, float]]] = {
        "models on pictures": lambda: _models(recipe, pictures(folder)),
        "products of vectors": _vectors,
        "tables of all stages": small_runs.stages,
        "files": _files,
        "a search": lambda: _search(recipe, found),
    }
    for what, step in steps.items():
        began = time.perf_counter()
        found |= step()
        say(f"{what}: {time.perf_counter() - began:.0f} s")
    return found


def _models(recipe: Recipe, images: list[bytes]) -> dict[str, float]:
    """Seconds to decode an image and make both inputs, and the rate of each model."""
    cfg = pipeline.embed_config(recipe)
    loading = _once(cfg.load) + _once(cfg.load)  # by the driver to see if they can be, and a worker
    models = cfg.load()
    limits = Limits(**recipe.images.model_dump())
    shown, showing = images[:SHOWN], Showing(limits, None)
    pixels, began = [], time.process_time()
    for data in images:
        image = decode(data, limits).pixels
        pixels.append([model.prepare(image) for model in models])
    preparing = (time.process_time() - began) / len(images)
    efforts = semantic_effort(recipe.encoder.model), copy_effort(recipe.copy_descriptor.weights)
    size, rates = min(recipe.encoder.batch, len(pixels)), []
    for which, (model, effort) in enumerate(zip(models, efforts, strict=True)):
        batch = np.stack([inputs[which] for inputs in pixels[:size]])
        rates.append(size * effort.flop / _seconds(partial(model, batch)) / 1e9)
    return {
        "image_bytes": float(np.mean([len(data) for data in images])),
        "prepare_s": preparing,
        "thumbnail_s": _seconds(lambda: [thumbnail(data, showing) for data in shown]) / len(shown),
        f"forward_{recipe.encoder.precision}_gflops": rates[0],
        "descriptor_gflops": rates[1],
        "load_models_s": loading,
    }


def _seconds(work: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """The median of several runs, after one that is not counted."""
    work()
    taken: list[float] = []
    while sum(taken) < SECONDS and len(taken) < RUNS:
        taken.append(_once(work, clock))
    return float(np.median(taken))


def _once(work: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    began = clock()
    work()
    return clock() - began


def _made_up(count: int) -> Floats:
    """Unit rows (n, DIM) around a few thousand directions, a tenth of them copies of others."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((2000, DIM), np.float32)
    rows = centres[rng.integers(len(centres), size=count)]
    rows += rng.standard_normal((count, DIM), np.float32)
    copies = rng.choice(count, count // 10, replace=False)
    rows[copies] = rows[rng.integers(count, size=len(copies))]
    rows[copies] += 0.7 * rng.standard_normal((len(copies), DIM), np.float32)
    unit: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _vectors() -> dict[str, float]:
    """GFLOP/s of the products in each way that rows are compared."""
    rows, what = _made_up(ROWS), knn.Search(64, 0.6, itself=True)
    numbers, rng = np.arange(ROWS), np.random.default_rng(0)
    cells = knn.fit_cells(rows, len(rows), rng)
    per_row = 2 * DIM * len(cells)
    assigning = _seconds(lambda: cells.assign(rows))
    way = cells.way(rows, Reach(np.inf, 8))
    held = Rows(rows, numbers)
    whole = Base.of(held, way[:, 0].astype(np.int64), len(cells))
    visits = Visits.of(way, len(cells))
    met = float(np.diff(visits.starts) @ np.diff(whole.starts))
    searching = _seconds(lambda: search(held, visits, whole, Best(ROWS, what.k, what.min_score)))
    few = Rows(rows[:QUERIES], numbers[:QUERIES])
    parts = [Rows(rows[at : at + 256], numbers[at : at + 256]) for at in range(0, ROWS, 256)]
    comparing = _seconds(lambda: knn.exact(few, parts, what))
    k, iterations = 250, 10
    fitting = _seconds(lambda: kmeans.fit(rows, k, iterations, np.random.default_rng(0)))
    groups = Groups.over(rows[:20_000], rows[-2048:])
    looked = len(groups.groups) + groups.beam * 20_000 / len(groups.groups)
    grouping = _seconds(lambda: groups.assign(rows, rows[:20_000]))
    return {
        "cells_gflops": ROWS * per_row / assigning / 1e9,
        "search_gflops": met * 2 * DIM / searching / 1e9,
        "exact_gflops": QUERIES * ROWS * 2 * DIM / comparing / 1e9,
        "kmeans_gflops": ROWS * k * 2 * DIM * iterations / fitting / 1e9,
        "groups_gflops": ROWS * looked * 2 * DIM / grouping / 1e9,
    }


def _search(recipe: Recipe, found: dict[str, float]) -> dict[str, float]:
    """Seconds that a search takes whatever its size, and how many times as long as its products.

    By two searches, and by what was found so far.
    """
    by_cells = recipe.search.model_copy(update={"exact_below": 0})
    asking = recipe.model_copy(update={"search": by_cells})

    def counted(ask: Ask, overhead: float) -> float:
        more = {"search_overhead": overhead, "search_start_s": 0.0}
        c = constants.shipped().updated({**found, **more})
        sizes = Sizes(ask.base, dict.fromkeys(recipe.sources.curated, 0), {})
        return sum(step.seconds for step in count_search(Job.of(asking, sizes, c), ask))

    small_runs.self_join(_made_up(SEARCHED[0]))  # compiles and loads what it needs
    beside, products = [], []  # seconds beside what has constants of its own, and of products
    for rows in SEARCHED:
        took, facts = small_runs.self_join(_made_up(rows))
        ask = Ask("copies", rows, rows, DIM, facts["nprobe"], itself=True)
        beside.append(took - counted(ask, 0))
        products.append(counted(ask, 1) - counted(ask, 0))
    return _line(products, beside)


def _line(products: list[float], seconds: list[float]) -> dict[str, float]:
    """What a search takes beside its products, and for them, by a small one and a large one.

    Noise may make either negative. Then all that the large one took is put down to its products: no
    plan may have them for nothing. If that is nothing too, what was shipped stays.
    """
    overhead = (seconds[1] - seconds[0]) / (products[1] - products[0])
    start = seconds[0] - overhead * products[0]
    if overhead <= 0 or start < 0:
        overhead, start = seconds[1] / products[1], 0.0
    return {"search_overhead": overhead, "search_start_s": start} if overhead > 0 else {}


def _archive() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number in range(ARCHIVED):
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = 1000
            tar.addfile(member, io.BytesIO(bytes(1000)))
    return out.getvalue()


def _files() -> dict[str, float]:
    """Bytes a second of vectors read, of files written and of hashes; seconds to read a table."""
    rows = 20_000
    raw = np.random.default_rng(0).integers(0, 100, (rows, 2 * DIM), dtype=np.uint8)
    block = raw.tobytes() * 4
    table = slice_table(raw.view(np.float16).astype(np.float32))
    cluster, quota = np.arange(rows) % 100, np.full(100, rows // 200)
    priority = np.ascontiguousarray(raw[:, :8]).view(np.uint64)[:, 0]
    cutting = _seconds(lambda: draw_by_cluster(cluster, priority, quota, rows // 4))
    with tempfile.TemporaryDirectory(prefix="lvd-") as folder:
        store = open_store(folder)
        write_table(store, "large.parquet", table)
        write_table(store, "small.parquet", pa.table({"row": list(range(256))}))
        loading = _seconds(lambda: rows_of(read_table(store, "large.parquet")))
        reading = _seconds(lambda: read_table(store, "small.parquet"))
        ids = binary(raw[:, :32])
        columns = {"id": ids, "fault": pa.nulls(rows, pa.string())}
        write_table(store, "images.parquet", pa.table(columns))
        looking = _seconds(
            lambda: read_table(store, "images.parquet")["fault"].is_null().to_numpy()
        )
        archive = _archive()
        scanning = _seconds(lambda: list(scan_tar(io.BytesIO(archive), len(archive))))
        writing = _seconds(lambda: store.write("block", block), time.perf_counter)
        sent, to = table.slice(0, 4 * BLOCKS), np.arange(4 * BLOCKS) % BLOCKS
        sending = _seconds(lambda: send(store, "sent", sent, to, BLOCKS))
        receiving = _seconds(lambda: [receive(store, at, "sent") for at in range(BLOCKS)])
        hashing = _seconds(lambda: hashlib.sha256(block))
    return {
        "load_bytes_per_s": raw.nbytes / loading,
        "table_s": reading,
        "send_block_s": sending / BLOCKS,
        "receive_block_s": receiving / BLOCKS,
        "cut_image_s": cutting / rows,
        "table_row_s": max(0.0, looking - reading) / rows,
        "scan_image_s": scanning / ARCHIVED,
        "write_bytes_per_s": len(block) / writing,
        "hash_bytes_per_s": len(block) / hashing,
    }
