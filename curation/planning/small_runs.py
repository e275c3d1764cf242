"""Small runs of the pipeline itself, in processor seconds of every stage."""

import contextlib
import math
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from curation import pipeline
from curation.algorithms.products import Floats
from curation.planning.pictures import picture
from curation.recipe import Recipe
from curation.runtime.events import Events
from curation.runtime.executor import InProcessExecutor, MakeWorker, Outcome, one_thread
from curation.runtime.store import Store, open_store, write_table
from curation.schema import vectors
from curation.stages.cluster_tables import binary, read_objective
from curation.stages.neighbour_plan import Join, SearchConfig
from curation.stages.neighbours import search
from curation.stages.tables import Embedded, Part, VectorView

SMALL, LARGE = 200, 1700  # images of the small runs
FEW, MANY = 50, 1000  # images a part in them
CURATED = 30  # of so many images one
COLD = 3  # new processes: how long one takes to load all varies by half
CLUSTERS, ITERATIONS = 50, 20  # of a longer fit
PART_ROWS = 10_000  # vectors a part
WORKERS = ("cluster", "shards", "lineage")
WORKING_DRIVERS = ("ingest", "dedup", "retrieve", "shards")  # others only read columns
# What the planner counts with; the rest is mostly maths, which it counts by itself.
USED = {
    *(f"{name}_{what}_s" for name in WORKERS for what in ("part", "image")),
    *(f"{name}_driver_part_s" for name in pipeline.STAGES),
    *(f"{name}_start_s" for name in pipeline.STAGES),
    *(f"{name}_driver_image_s" for name in WORKING_DRIVERS),
    "embed_part_s",
    "kmeans_iteration_s",
}


class _Descriptor(torch.nn.Module):
    """A copy descriptor that costs nothing: colours on a grid."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = torch.nn.functional.adaptive_avg_pool2d(x, (6, 6)).flatten(1)
        return torch.nn.functional.normalize(grid - grid.mean(dim=1, keepdim=True), dim=1)


def stages() -> dict[str, float]:
    """Seconds of each stage to begin, for a part and for an image, maths nearly left out, and of an
    iteration of k-means.

    To begin: in a process of its own, which loads what the stage needs.
    """
    with tempfile.TemporaryDirectory(prefix="lvd-") as name:
        folder = Path(name)
        _tiny_models(folder)
        for seed in range(LARGE):
            path = folder / ("pool" if seed % CURATED else "curated") / f"{seed:05d}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(picture(seed, 64, 64, 75))
            if seed == SMALL - 1:
                _run(folder, "first", FEW)  # after which all is compiled
                small = _run(folder, "small", FEW)
                cold = _median([in_new_process(_run, folder, f"cold{n}", FEW) for n in range(COLD)])
        large, wide = _run(folder, "large", FEW), _run(folder, "wide", MANY)
        found = {"kmeans_iteration_s": _iteration(folder, "large")}
    few, many, least = _parts(SMALL, FEW), _parts(LARGE, FEW), _parts(LARGE, MANY)
    for name in cold:
        part = max(0.0, (large[name] - wide[name]) / (many - least))
        both = large[name] - small[name] - part * (many - few)
        image = max(0.0, both / (LARGE - SMALL))
        begin = max(0.0, cold[name] - SMALL * image - few * part)
        found |= {f"{name}_part_s": part, f"{name}_image_s": image}
        stage = name.removesuffix("_driver")
        found[f"{stage}_start_s"] = found.get(f"{stage}_start_s", 0.0) + begin
    return {name: value for name, value in found.items() if name in USED}


def _median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.median([run[name] for run in runs])) for name in runs[0]}


def _iteration(folder: Path, name: str) -> float:
    """Seconds of one of k-means, with what it publishes, by a short and a long fit of a run."""
    seconds, done = [], []
    for iterations in (2, 1, ITERATIONS):  # the first loads what it needs
        seconds.append(_run(folder, name, FEW, CLUSTERS, iterations)["cluster_driver"])
        done.append(len(read_objective(open_store(str(folder / name)))))  # it may rest before
    return max(0.0, (seconds[2] - seconds[1]) / (done[2] - done[1]))


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


def _run(
    folder: Path, name: str, part_images: int, k: int = 5, iterations: int = 3
) -> dict[str, float]:
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
            "cluster": {"k": k, "iterations": iterations},
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


def in_new_process(run: Callable[..., Any], *arguments: Any) -> Any:
    """What `run` returns there: nothing is loaded before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=one_thread) as pool:
        return pool.submit(run, *arguments).result()


def self_join(rows: Floats) -> tuple[float, dict[str, Any]]:
    """Processor seconds of dedup's search of unit rows (n, D), and how it was searched."""
    with tempfile.TemporaryDirectory(prefix="lvd-") as folder:
        store, embedded, parts = open_store(folder), Embedded("made up"), []
        for number, base in enumerate(range(0, len(rows), PART_ROWS)):
            block = rows[base : base + PART_ROWS].astype(np.float16)
            place = ("pool", "", "", "folder", "", number)
            part = Part(number, *place, len(block), base, str(number))
            columns = [pa.array(np.arange(len(block), dtype=np.int32)), binary(block[:, :1])]
            packed = pa.Table.from_arrays(
                [*columns, binary(block)], schema=vectors(1, rows.shape[1])
            )
            write_table(store, embedded.vectors_path(part), packed)
            parts.append(part)
        view, how = VectorView(embedded, "copy"), SearchConfig("cells", 0, 0.99, 10**12)
        join = Join("dedup", "dedup/self", view, view, 64, 0.6, True, how, 0)
        began = time.process_time()
        facts = search(join, parts, parts, store, InProcessExecutor(), Events(store))
        return time.process_time() - began, facts
