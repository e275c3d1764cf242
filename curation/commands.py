"""What the commands of `curate` do that need the stages, and with them torch."""

import argparse
import contextlib
import math
import os
import sys
import time
from functools import partial

from curation import pipeline, queries, serving
from curation.planning import calibrate as calibration
from curation.planning import composition, constants, planner
from curation.progress import Bars
from curation.recipe import Recipe, RecipeError, load, parse
from curation.runtime.events import Events
from curation.runtime.executor import Executor, InProcessExecutor
from curation.runtime.manifest import StageReport, forget
from curation.runtime.store import Store, StoreError, hold, open_store
from curation.schema import RECIPE_FILE

TINY_JOB_IMAGES = 2000


def run(options: argparse.Namespace) -> None:
    recipe = load(options.recipe, options.overrides)
    for line in pipeline.warnings(recipe):
        print(f"curate: {line}", file=sys.stderr)
    store = open_store(recipe.output)
    with contextlib.ExitStack() as held:
        held.enter_context(hold(store, pipeline.FOLDERS))
        if options.serve is not None:
            held.enter_context(serving.beside(recipe.output, options.serve))
        reports = _execute(recipe, options.ray, options.until, store)
    if reports[-1].stage == "report":
        queries.print_funnel(store)
    else:
        print(f"done until {reports[-1].stage}; curate status {recipe.output}")


def plan(options: argparse.Namespace) -> None:
    recipe, pool = load(options.recipe, options.overrides), _count(options.images)
    c = constants.load(options.constants)
    precision = recipe.encoder.precision
    on = planner.hardware(c, options.nodes, options.cores, options.gpus, options.gpu, precision)
    found = composition.sizes(recipe, pipeline.ingest_config(recipe), pool)
    stages = planner.plan(recipe, found, c, on)
    composition.print_shares(composition.shares(recipe, found), found)
    planner.print_plan(stages, found, c, on)
    if options.sources:
        planner.print_sources(c)


def _count(text: str | None) -> int | None:
    """A number of images, as in 1200000000, 1_200_000_000 or 1.2e9."""
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 1 <= number < 2**53:
        raise RecipeError(f"--images {text}: must be a number of at least 1, as in 1.2e9")
    return int(number)


def calibrate(options: argparse.Namespace) -> None:
    recipe = load(options.recipe)
    try:
        with open(options.out, "w", encoding="utf-8") as file:
            measured = calibration.measure(recipe, options.images, print)
            file.write(constants.dump(measured, f"curate calibrate, {time.strftime('%Y-%m-%d')}"))
    except OSError as error:
        raise RecipeError(f"--out {options.out}: {os.strerror(error.errno or 0)}") from None
    print(f"wrote {options.out}; use it: curate plan {options.recipe} --constants {options.out}")


def retry(options: argparse.Namespace) -> None:
    store = _open_run(options.run)
    recipe = _recipe_of(store)
    with hold(store, pipeline.FOLDERS):
        dropped = pipeline.drop_retryable(recipe, store)
        print(f"{dropped} parts with failed or unreadable images are tried again")
        _execute(recipe, options.ray, None, store)
    queries.print_funnel(store)


def _execute(
    recipe: Recipe, ray_address: str | None, until: str | None, store: Store
) -> list[StageReport]:
    with Bars() as bars:
        events = Events(store, bars.show)
        make = partial(_make_executor, ray_address, recipe)
        return pipeline.run(recipe, store, make, events, until)


def _make_executor(address: str | None, recipe: Recipe, images: int) -> Executor:
    """Ray unless turned off or the job is tiny; inside a Ray job, the cluster it runs on."""
    if address is None:
        address = os.environ.get("RAY_ADDRESS") or ("local" if images > TINY_JOB_IMAGES else "off")
    if address == "off":
        return InProcessExecutor()
    from curation.runtime.ray_executor import RayExecutor

    return RayExecutor(address, recipe.resources.workers)


def status(options: argparse.Namespace) -> None:
    queries.print_status(_open_run(options.run))


def why(options: argparse.Namespace) -> None:
    queries.print_story(_open_run(options.run), options.image)


def report(options: argparse.Namespace) -> None:
    store = _open_run(options.run)
    with hold(store, pipeline.FOLDERS):
        forget(store, "report")
        _execute(_recipe_of(store), "off", None, store)
    queries.print_funnel(store)


def lineage(options: argparse.Namespace) -> None:
    rows = queries.write_lineage(_open_run(options.run), options.out)
    print(f"{rows} rows in {options.out}")


def _open_run(uri: str) -> Store:
    store = open_store(uri)
    if not store.exists(RECIPE_FILE):
        raise StoreError(f"{uri}: not a run (no {RECIPE_FILE} there)")
    return store


def _recipe_of(store: Store) -> Recipe:
    where = store.locate(RECIPE_FILE)
    return parse(store.read(RECIPE_FILE).decode(), where, [])
