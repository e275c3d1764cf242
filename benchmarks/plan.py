"""What `curate plan` says of this machine beside what runs take here, stage by stage.

    python -m benchmarks.plan --images ../shared/bench [--sizes 600 2000] [--constants FILE]

Measures the constants first, unless a file of `curate calibrate` is given. Then the pipeline runs
on real photographs at two sizes, and the search of dedup on generated vectors at two more: one
process, one thread. Seconds are of the processor, so that other work beside it counts not.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.measuring import machine, say, table, target
from benchmarks.vectors import COPIES, make
from curation import pipeline
from curation.images.effort import copy_effort, semantic_effort
from curation.planning import calibrate, composition, constants, planner
from curation.planning.constants import Constants
from curation.planning.job import Job
from curation.planning.search import Ask, search
from curation.recipe import Recipe
from curation.runtime.events import Events
from curation.runtime.executor import InProcessExecutor, one_thread
from curation.runtime.store import open_store, write_table
from curation.schema import vectors
from curation.stages import neighbours
from curation.stages.cluster_tables import binary
from curation.stages.neighbour_plan import Join, SearchConfig
from curation.stages.tables import Embedded, Part, VectorView

MOST_OFF = 0.30
TELLING_S = 1.0  # stages that take less say more of the clock than of the plan
DIM = 256
PART_ROWS = 10_000
ONE = planner.Hardware(nodes=1, cores=1, gpus=0, gpu=None)


def project(images: Path, size: int, folder: Path) -> Recipe:
    """A recipe over links to `size` pool photographs and a tenth as many curated ones."""
    for name, count in (("pool", size), ("curated", size // 10)):
        found = sorted(path for path in (images / name).rglob("*") if path.is_file())
        (folder / name).mkdir()
        for path in found[:: max(1, len(found) // count)][:count]:
            (folder / name / path.name).symlink_to(path.resolve())
    return Recipe.model_validate(
        {
            "name": "plan",
            "output": str(folder / "run"),
            "sources": {
                "pool": [{"uri": str(folder / "pool")}],
                "curated": {"wanted": {"uri": str(folder / "curated")}},
            },
            "encoder": {"model": "lvd_demo"},
            "cluster": {"k": 50},
        }
    )


def run(recipe: Recipe) -> dict[str, float]:
    """Processor seconds of every stage."""
    store = open_store(recipe.output)
    clock = calibrate.Clock(store)
    pipeline.run(recipe, store, lambda _: clock.executor, clock)
    return {name: clock.seconds[name] + clock.seconds[f"{name}_driver"] for name in pipeline.STAGES}


def predicted(recipe: Recipe, c: Constants) -> dict[str, float]:
    found = composition.sizes(recipe, pipeline.ingest_config(recipe))
    return {stage.name: stage.seconds for stage in planner.plan(recipe, found, c, ONE)}


def stages(images: Path, sizes: Sequence[int], c: Constants) -> int:
    """Prints a table of the stages; returns how many targets are missed."""
    lines, missed, off = [], 0, {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            recipe = project(images, size, Path(folder))
            said, took = predicted(recipe, c), run(recipe)
        said["all"], took["all"] = sum(said.values()), sum(took.values())
        for name, seconds in took.items():
            ratio = said[name] / seconds
            lines.append([f"{size:,}", name, f"{said[name]:.2f}", f"{seconds:.2f}", f"{ratio:.2f}"])
            if seconds >= TELLING_S:
                off[f"{name}, {size:,} images"] = ratio
    table(["pool", "stage", "predicted, s", "measured, s", "ratio"], lines)
    for name, ratio in off.items():
        within = 1 / (1 + MOST_OFF) <= ratio <= 1 + MOST_OFF
        missed += target(f"{name}: predicted {ratio:.2f} of measured, within 30 %", within)
    return missed


def self_join(rows: int, folder: Path) -> tuple[float, dict[str, Any]]:
    """Processor seconds of dedup's search over generated vectors, and how it was searched."""
    store, embedded = open_store(str(folder)), Embedded("made up")
    made, parts = make(rows, COPIES, DIM), []
    for number, base in enumerate(range(0, rows, PART_ROWS)):
        block = made[base : base + PART_ROWS].astype(np.float16)
        place = ("pool", "", "", "folder", "", number)
        part = Part(number, *place, len(block), base, str(number))
        columns = [pa.array(np.arange(len(block), dtype=np.int32)), binary(block[:, :1])]
        schema = vectors(1, DIM)
        packed = pa.Table.from_arrays([*columns, binary(block)], schema=schema)
        write_table(store, embedded.vectors_path(part), packed)
        parts.append(part)
    view, how = VectorView(embedded, "copy"), SearchConfig("cells", 0, 0.99, 10**12)
    join = Join("dedup", "dedup/self", view, view, 64, 0.6, True, how, 0)
    began = time.process_time()
    facts = neighbours.search(join, parts, parts, store, InProcessExecutor(), Events(store))
    return time.process_time() - began, facts


def searches(recipe: Recipe, sizes: Sequence[int], c: Constants) -> int:
    """Prints a table of self-joins, with the nprobe that each chose; returns the targets missed."""
    lines, missed = [], 0
    effort = semantic_effort("lvd_demo"), copy_effort("builtin")
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            took, facts = self_join(rows, Path(folder))
        exact = recipe.search.model_copy(update={"exact_below": 0})
        asking = recipe.model_copy(update={"search": exact})
        job = Job(asking, composition.Sizes(rows, {}, {}), [], *effort, c)
        ask = Ask("copies", rows, rows, DIM, facts["nprobe"], itself=True)
        said = sum(step.seconds for step in search(job, ask))
        ratio = said / took
        lines.append([f"{rows:,}", facts["nprobe"], f"{said:.1f}", f"{took:.1f}", f"{ratio:.2f}"])
        within = 1 / (1 + MOST_OFF) <= ratio <= 1 + MOST_OFF
        missed += target(f"search of {rows:,} rows: {ratio:.2f} of measured", within)
    print()
    table(["rows", "nprobe", "predicted, s", "measured, s", "ratio"], lines)
    return missed


def main(arguments: list[str] | None = None) -> int:
    """The number of targets missed."""
    parser = argparse.ArgumentParser(description="The planner beside real runs.")
    parser.add_argument("--images", type=Path, required=True, help="folder with pool/ and curated/")
    parser.add_argument("--sizes", type=int, nargs="+", default=(600, 2000))
    parser.add_argument("--rows", type=int, nargs="*", default=(60_000, 150_000))
    parser.add_argument("--constants", help="of `curate calibrate`; left out: measured now")
    options = parser.parse_args(arguments)
    one_thread()
    print(f"{machine()}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        recipe = project(options.images, 64, Path(folder))
        path = options.constants
        if path is None:
            path = f"{folder}/machine.yaml"
            measured = calibrate.measure(recipe, str(options.images / "pool"), say)
            Path(path).write_text(constants.dump(measured, "measured for this table"))
        c = constants.load(path)
    with tempfile.TemporaryDirectory() as folder:
        run(project(options.images, 64, Path(folder)))  # so that all is loaded and compiled
    missed = stages(options.images, options.sizes, c)
    return missed + searches(recipe, options.rows, c)


if __name__ == "__main__":
    sys.exit(main())
