"""What `curate plan` says of this machine beside what runs take here, stage by stage.

    python -m benchmarks.plan --images ../shared/bench [--sizes 600 2000] [--constants FILE]

Measures the constants first, unless a file of `curate calibrate` is given. Then the pipeline runs
on real photographs at two sizes, each in a process of its own as `curate run` is, and the search of
dedup on generated vectors at two more, other ones than calibration searches, with other dimensions:
one thread. Seconds are of the processor, so that other work beside it counts not.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measuring import machine, say, table, target
from benchmarks.vectors import COPIES, make
from curation import pipeline
from curation.planning import calibrate, composition, constants, planner, small_runs
from curation.planning.constants import Constants
from curation.planning.job import Job
from curation.planning.search import Ask, search
from curation.recipe import Recipe
from curation.runtime.executor import one_thread
from curation.runtime.store import open_store

MOST_OFF = 0.30
TELLING_S = 0.5  # stages that take less are a few files and imports, and nobody plans for them
DIM = 256
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
    """Processor seconds of every stage, in a new process: what it needs is loaded in it."""
    seconds: dict[str, float] = small_runs.in_new_process(_run, recipe)
    return seconds


def _run(recipe: Recipe) -> dict[str, float]:
    store = open_store(recipe.output)
    clock = small_runs.Clock(store)
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


def searches(recipe: Recipe, sizes: Sequence[int], c: Constants) -> int:
    """Prints a table of self-joins, with the nprobe that each chose; returns the targets missed."""
    lines, missed = [], 0
    for rows in sizes:
        took, facts = small_runs.self_join(make(rows, COPIES, DIM))
        exact = recipe.search.model_copy(update={"exact_below": 0})
        asking = recipe.model_copy(update={"search": exact})
        nothing = dict.fromkeys(recipe.sources.curated, 0)
        job = Job.of(asking, composition.Sizes(rows, nothing, {}), c)
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
    parser.add_argument("--rows", type=int, nargs="*", default=(80_000, 200_000))
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
        run(project(options.images, max(options.sizes), Path(folder)))  # so that all is compiled
    small_runs.self_join(make(4000, COPIES, DIM))  # and loaded here
    missed = stages(options.images, options.sizes, c)
    return missed + searches(recipe, options.rows, c)


if __name__ == "__main__":
    sys.exit(main())
