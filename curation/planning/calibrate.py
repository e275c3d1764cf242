"""`curate calibrate`: measures on this machine what the planner counts with, on one core each.

The tables of every stage by small runs of the pipeline itself, the models of the recipe on
pictures, and the products of searches and k-means on made-up vectors. About two minutes.
"""

import contextlib
import hashlib
import io
import math
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from curation import pipeline
from curation.algorithms import kmeans, knn
from curation.algorithms.best import Best
from curation.algorithms.groups import Groups
from curation.algorithms.products import Floats
from curation.algorithms.search import Base, Queries, Visits, search
from curation.images.decode import Limits, decode
from curation.images.effort import copy_effort, semantic_effort
from curation.images.sources import scan_tar
from curation.recipe import Recipe, RecipeError
from curation.runtime.events import Events
from curation.runtime.executor import InProcessExecutor, MakeWorker, Outcome, one_thread
from curation.runtime.store import Store, open_store, read_table, write_table
from curation.stages.cluster_tables import binary, slice_table
from curation.stages.neighbour_workers import rows_of

SMALL, LARGE = 200, 1700  # images of the small runs
FEW, MANY = 50, 1000  # images a part in them
CURATED = 30  # of so many images one
WORKERS = ("cluster", "shards", "lineage")
WORKING_DRIVERS = ("ingest", "dedup", "retrieve", "shards")  # others only read columns
# What the planner counts with; the rest is mostly maths, which it counts by itself.
USED = {
    *(f"{name}_{what}_s" for name in WORKERS for what in ("part", "image")),
    *(f"{name}_driver_{what}_s" for name in pipeline.STAGES for what in ("start", "part")),
    *(f"{name}_driver_image_s" for name in WORKING_DRIVERS),
    "embed_part_s",
}
DIM = 384
ROWS = 40_000  # made-up vectors
QUERIES = 1024
ARCHIVED = 2000  # images of an archive that is scanned
SECONDS, RUNS = 2.0, 20  # for one figure, at most


def measure(recipe: Recipe, folder: str | None, say: Callable[[str], None]) -> dict[str, float]:
    """Constants by name. `folder` holds pictures like those that will be embedded.

    Processor time, except for writing: what else the machine does meanwhile counts not.
    """
    one_thread()
    found: dict[str, float] = {}
    steps: dict[str, Callable[[], dict[str, float]]] = {
        "models on pictures": lambda: _models(recipe, _pictures(folder)),
        "products of vectors": _vectors,
        "tables of all stages": _stages,
        "files": _files,
    }
    for what, step in steps.items():
        began = time.perf_counter()
        found |= step()
        say(f"{what}: {time.perf_counter() - began:.0f} s")
    return found


def _pictures(folder: str | None) -> list[bytes]:
    if folder is None:
        return [_picture(seed, 500, 400, 90) for seed in range(64)]
    names = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    chosen = names[:: max(1, len(names) // 256)]
    if not chosen:
        raise RecipeError(f"--images {folder}: no files there")
    return [path.read_bytes() for path in chosen]


def _picture(seed: int, width: int, height: int, quality: int) -> bytes:
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    grain = rng.normal(0, 6, (height, width, 3))
    pixels = np.asarray(smooth.resize((width, height), Image.Resampling.BICUBIC)) + grain
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=quality)
    return out.getvalue()


def _models(recipe: Recipe, pictures: list[bytes]) -> dict[str, float]:
    """Seconds to decode an image and make both inputs, and the rate of both models."""
    cfg = pipeline.embed_config(recipe)
    loading = _once(cfg.load) + _once(cfg.load)  # by the driver to see if they can be, and a worker
    models = cfg.load()
    limits = Limits(**recipe.images.model_dump())
    pixels, began = [], time.process_time()
    for data in pictures:
        image = decode(data, limits).pixels
        pixels.append([model.prepare(image) for model in models])
    preparing = (time.process_time() - began) / len(pictures)
    flop = semantic_effort(recipe.encoder.model).flop
    flop += copy_effort(recipe.copy_descriptor.weights).flop
    size, seconds = min(recipe.encoder.batch, len(pixels)), 0.0
    for which, model in enumerate(models):
        batch = np.stack([inputs[which] for inputs in pixels[:size]])
        seconds += _seconds(partial(model, batch))
    return {
        "image_bytes": float(np.mean([len(data) for data in pictures])),
        "prepare_s": preparing,
        "forward_gflops": size * flop / seconds / 1e9,
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
    """Unit rows (n, DIM) around a few thousand directions."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((2000, DIM), np.float32)
    rows = centres[rng.integers(len(centres), size=count)]
    rows += rng.standard_normal((count, DIM), np.float32)
    unit: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _vectors() -> dict[str, float]:
    """GFLOP/s of the products in each way that rows are compared."""
    rows, what = _made_up(ROWS), knn.Search(64, 0.6, itself=True)
    numbers, rng = np.arange(ROWS), np.random.default_rng(0)
    cells = knn.fit_cells(rows, rng)
    axes = cells.axes.shape[1]
    per_row = 2 * axes * (DIM + len(cells))
    assigning = _once(lambda: cells.assign(rows))
    way = cells.way(rows, 8)
    whole = Base.of(rows, numbers, way[:, 0].astype(np.int64), len(cells))
    visits = Visits.of(way, len(cells))
    met = float(np.diff(visits.starts) @ np.diff(whole.starts))
    best = Best(ROWS, what.k, what.min_score)
    searching = _once(lambda: search(Queries(rows, numbers), visits, whole, best))
    few = Queries(rows[:QUERIES], numbers[:QUERIES])
    parts = [Queries(rows[at : at + 256], numbers[at : at + 256]) for at in range(0, ROWS, 256)]
    comparing = _once(lambda: knn.exact(few, parts, what))
    k, iterations = 250, 10
    fitting = _once(lambda: kmeans.fit(rows, k, iterations, np.random.default_rng(0)))
    few_rows = partial(kmeans.fit, rows[:2000], 50, 2 * iterations, np.random.default_rng(0))
    turning = _once(few_rows)
    groups = Groups.over(rows[:20_000], rows[-2048:])
    looked = len(groups.groups) + groups.beam * 20_000 / len(groups.groups)
    grouping = _once(lambda: groups.assign(rows, rows[:20_000]))
    return {
        "cells_gflops": ROWS * per_row / assigning / 1e9,
        "search_gflops": met * 2 * DIM / searching / 1e9,
        "exact_gflops": QUERIES * ROWS * 2 * DIM / comparing / 1e9,
        "kmeans_gflops": ROWS * k * 2 * DIM * iterations / fitting / 1e9,
        "kmeans_iteration_s": turning / (2 * iterations),
        "groups_gflops": ROWS * looked * 2 * DIM / grouping / 1e9,
    }


class _Descriptor(torch.nn.Module):
    """A copy descriptor that costs nothing: colours on a grid."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = torch.nn.functional.adaptive_avg_pool2d(x, (6, 6)).flatten(1)
        return torch.nn.functional.normalize(grid - grid.mean(dim=1, keepdim=True), dim=1)


def _stages() -> dict[str, float]:
    """Seconds of each stage to begin, for a part and for an image, maths nearly left out."""
    with tempfile.TemporaryDirectory(prefix="lvd-") as name:
        folder = Path(name)
        _tiny_models(folder)
        for seed in range(LARGE):
            path = folder / ("pool" if seed % CURATED else "curated") / f"{seed:05d}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(_picture(seed, 64, 64, 75))
            if seed == SMALL - 1:
                cold = _run(folder, "cold", FEW)
                small = _run(folder, "small", FEW)
        large, wide = _run(folder, "large", FEW), _run(folder, "wide", MANY)
    found: dict[str, float] = {}
    few, many, least = _parts(SMALL, FEW), _parts(LARGE, FEW), _parts(LARGE, MANY)
    for name in cold:
        part = max(0.0, (large[name] - wide[name]) / (many - least))
        both = large[name] - small[name] - part * (many - few)
        image = max(0.0, both / (LARGE - SMALL))
        begin = max(0.0, cold[name] - SMALL * image - few * part)
        found |= {f"{name}_part_s": part, f"{name}_image_s": image, f"{name}_start_s": begin}
    return {name: value for name, value in found.items() if name in USED}


def _parts(images: int, part_images: int) -> int:
    """Of the pool and of every thirtieth image, the curated ones."""
    curated = -(-images // CURATED)
    return math.ceil(curated / part_images) + math.ceil((images - curated) / part_images)


def _tiny_models(folder: Path) -> None:
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "vit.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # SSCD's format
        torch.jit.script(_Descriptor()).save(str(folder / "copy.pt"))  # type: ignore[no-untyped-call]


def _run(folder: Path, name: str, part_images: int) -> dict[str, float]:
    """Seconds of every stage of a run that selects nearly all."""
    recipe = Recipe.model_validate(
        {
            "name": "calibrate",
            "output": str(folder / name),
            "sources": {
                "pool": [{"uri": str(folder / "pool")}],
                "curated": {
                    "all": {
                        "uri": str(folder / "curated"),
                        "retrieve": ["as_is", {"cluster": {"min_queries": 1}}],
                    }
                },
            },
            "encoder": {"model": "test_vit", "weights": str(folder / "vit.safetensors")},
            "copy_descriptor": {"weights": str(folder / "copy.pt")},
            "dedup": {"min_cosine": 0.999},
            "cluster": {"k": 5, "iterations": 3},
            "resources": {"part_images": part_images},
        }
    )
    store = open_store(recipe.output)
    clock = Clock(store)
    pipeline.run(recipe, store, lambda _: clock.executor, clock)
    return clock.seconds


class Clock(Events):
    """Events that also take the processor time of every stage: of its workers and its driver.

    What else the machine does meanwhile counts not.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.seconds: dict[str, float] = {}
        self.executor = TimedExecutor()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began, before = time.process_time(), self.executor.seconds
        with super().stage(name):
            yield
        workers = self.executor.seconds - before
        self.seconds |= {name: workers, f"{name}_driver": time.process_time() - began - workers}


class TimedExecutor(InProcessExecutor):
    """Takes the processor time that its workers need."""

    seconds = 0.0

    def map(
        self, make_worker: MakeWorker, items: Sequence[Any], gpu: bool = False
    ) -> Iterator[Outcome]:
        outcomes = super().map(make_worker, items, gpu)
        while True:
            began = time.process_time()
            outcome = next(outcomes, None)
            self.seconds += time.process_time() - began
            if outcome is None:
                return
            yield outcome


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
        hashing = _seconds(lambda: hashlib.sha256(block))
    return {
        "load_bytes_per_s": raw.nbytes / loading,
        "table_s": reading,
        "table_row_s": max(0.0, looking - reading) / rows,
        "scan_image_s": scanning / ARCHIVED,
        "write_bytes_per_s": len(block) / writing,
        "hash_bytes_per_s": len(block) / hashing,
    }
