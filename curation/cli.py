"""`curate`: run a recipe, and look at what it did."""

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

from curation import pipeline, queries, serving, starter
from curation.images.encoders import EncoderError
from curation.planning import calibrate, composition, constants, planner
from curation.progress import Bars
from curation.recipe import Recipe, RecipeError, load, parse
from curation.runtime.events import Events
from curation.runtime.executor import Executor, InProcessExecutor
from curation.runtime.manifest import StageReport, forget
from curation.runtime.store import Store, StoreError, hold, open_store
from curation.schema import RECIPE_FILE
from curation.service.auth import ServiceError

TINY_JOB_IMAGES = 2000


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 when a run failed, 2 for a mistake in the recipe or the arguments."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (RecipeError, EncoderError, ServiceError) as error:
        print(f"curate: {error}", file=sys.stderr)
        return 2
    except StoreError as error:
        print(f"curate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("curate: stopped; finished parts are kept, run again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="curate", description="Curate raw images for DINOv2.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, command: Callable[[argparse.Namespace], None], help: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(command=command)
        return sub

    init = add("init", _init, "write a commented starter recipe")
    init.add_argument("path", nargs="?", default="recipe.yaml")
    init.add_argument("--pool", metavar="URI", help="the uncurated images")
    init.add_argument("--like", metavar="URI", help="images that show what is wanted")
    init.add_argument("--output", metavar="URI", help="where the run goes")

    run = add("run", _run, "run a recipe; goes on where an earlier run stopped")
    run.add_argument("recipe", help="a file, or - to read it from the standard input")
    run.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides")
    run.add_argument(
        "--until", choices=pipeline.STAGES, metavar="STAGE", help=", ".join(pipeline.STAGES)
    )
    _add_ray(run)
    run.add_argument(
        "--serve",
        nargs="?",
        type=int,
        const=serving.PORT,
        metavar="PORT",
        help=f"show the run at http://localhost:PORT while it goes on (default {serving.PORT})",
    )

    _add_plan(add("plan", _plan, "what a recipe takes, before it runs: images, hours, cost"))

    calibrate = add("calibrate", _calibrate, "measure this machine for `curate plan`")
    calibrate.add_argument("recipe", help="names the models to measure")
    calibrate.add_argument("--images", metavar="FOLDER", help="pictures like the pool's")
    calibrate.add_argument("--out", required=True, metavar="FILE.yaml")

    retry = add("retry", _retry, "try failed parts and unreadable images of a run again")
    retry.add_argument("run")
    _add_ray(retry)

    status = add("status", _status, "where every stage of a run stands")
    status.add_argument("run")

    why = add("why", _why, "the story of one image: what was decided, and why")
    why.add_argument("run")
    why.add_argument(
        "image", metavar="KEY-OR-ID", help="its key, or its id (at least 8 digits of it)"
    )

    report = add("report", _report, "write the report again, and print the funnel")
    report.add_argument("run")

    serve = add("serve", _serve, "API and web page over a folder or s3:// prefix of runs")
    serve.add_argument("runs", metavar="RUNS")
    serve.add_argument("--host", default=serving.LOCALHOST, help="others reach 0.0.0.0")
    serve.add_argument("--port", type=int, default=serving.PORT, help="0: a free one")
    serve.add_argument("--tokens", metavar="FILE", help="lines of `read TOKEN` or `submit TOKEN`")
    serve.add_argument("--ray-dashboard", metavar="URL", help="where POST /api/jobs sends recipes")

    lineage = add("lineage", _lineage, "one Parquet file with a row for every input image")
    lineage.add_argument("run")
    lineage.add_argument("--out", required=True, metavar="FILE.parquet")
    return parser


def _add_plan(plan: argparse.ArgumentParser) -> None:
    plan.add_argument("recipe")
    plan.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides")
    plan.add_argument("--images", metavar="N", help="in the pool, as in 1.2e9")
    plan.add_argument("--nodes", type=int, default=1, metavar="N")
    plan.add_argument("--gpus", type=int, default=0, metavar="N", help="of a node")
    plan.add_argument("--gpu", metavar="NAME", help="v100, a100, h100, or one of --constants")
    plan.add_argument("--cores", type=int, metavar="N", help="of a node")
    plan.add_argument("--constants", metavar="FILE", help="written by `curate calibrate`")
    plan.add_argument("--sources", action="store_true", help="print where each constant is from")


def _add_ray(parser: argparse.ArgumentParser) -> None:
    text = "a cluster's address, `local` for a Ray of its own, `off` for this process alone"
    parser.add_argument("--ray", metavar="ADDRESS|local|off", help=text)


def _init(options: argparse.Namespace) -> None:
    starter.write(options.path, options.pool, options.like, options.output)
    print(f"wrote {options.path}; edit it, then: curate run {options.path}")


def _run(options: argparse.Namespace) -> None:
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


def _plan(options: argparse.Namespace) -> None:
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


def _calibrate(options: argparse.Namespace) -> None:
    recipe = load(options.recipe)
    try:
        with open(options.out, "w", encoding="utf-8") as file:
            measured = calibrate.measure(recipe, options.images, print)
            file.write(constants.dump(measured, f"curate calibrate, {time.strftime('%Y-%m-%d')}"))
    except OSError as error:
        raise RecipeError(f"--out {options.out}: {os.strerror(error.errno or 0)}") from None
    print(f"wrote {options.out}; use it: curate plan {options.recipe} --constants {options.out}")


def _retry(options: argparse.Namespace) -> None:
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


def _status(options: argparse.Namespace) -> None:
    queries.print_status(_open_run(options.run))


def _why(options: argparse.Namespace) -> None:
    queries.print_story(_open_run(options.run), options.image)


def _report(options: argparse.Namespace) -> None:
    store = _open_run(options.run)
    with hold(store, pipeline.FOLDERS):
        forget(store, "report")
        _execute(_recipe_of(store), "off", None, store)
    queries.print_funnel(store)


def _serve(options: argparse.Namespace) -> None:
    fields = ("runs", "host", "port", "tokens", "ray_dashboard")
    serving.serve(serving.ServeOptions(**{name: getattr(options, name) for name in fields}))


def _lineage(options: argparse.Namespace) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
