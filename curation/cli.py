"""`curate`: run a recipe, and look at what it did."""

import argparse
import sys
from collections.abc import Callable, Sequence

from curation import serving, starter
from curation.images.errors import EncoderError
from curation.recipe import RecipeError
from curation.runtime.store import StoreError
from curation.schema import VERSIONS
from curation.service.auth import ServiceError


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

    run = add("run", _later("run"), "run a recipe; goes on where an earlier run stopped")
    run.add_argument("recipe", help="a file, or - to read it from the standard input")
    run.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides")
    run.add_argument("--until", choices=tuple(VERSIONS), metavar="STAGE", help=", ".join(VERSIONS))
    _add_ray(run)
    run.add_argument(
        "--serve",
        nargs="?",
        type=int,
        const=serving.PORT,
        metavar="PORT",
        help=f"show the run at http://localhost:PORT while it goes on (default {serving.PORT})",
    )

    _add_plan(
        add("plan", _later("plan"), "what a recipe takes, before it runs: images, hours, cost")
    )

    calibrate = add("calibrate", _later("calibrate"), "measure this machine for `curate plan`")
    calibrate.add_argument("recipe", help="names the models to measure")
    calibrate.add_argument("--images", metavar="FOLDER", help="pictures like the pool's")
    calibrate.add_argument("--out", required=True, metavar="FILE.yaml")

    retry = add("retry", _later("retry"), "try failed parts and unreadable images of a run again")
    retry.add_argument("run")
    _add_ray(retry)

    status = add("status", _later("status"), "where every stage of a run stands")
    status.add_argument("run")

    why = add("why", _later("why"), "the story of one image: what was decided, and why")
    why.add_argument("run")
    why.add_argument(
        "image", metavar="KEY-OR-ID", help="its key, or its id (at least 8 digits of it)"
    )

    report = add("report", _later("report"), "write the report again, and print the funnel")
    report.add_argument("run")

    serve = add("serve", _serve, "API and web page over a folder or s3:// prefix of runs")
    serve.add_argument("runs", metavar="RUNS")
    serve.add_argument("--host", default=serving.LOCALHOST, help="others reach 0.0.0.0")
    serve.add_argument("--port", type=int, default=serving.PORT, help="0: a free one")
    serve.add_argument("--tokens", metavar="FILE", help="lines of `read TOKEN` or `submit TOKEN`")
    serve.add_argument("--ray-dashboard", metavar="URL", help="where POST /api/jobs sends recipes")

    lineage = add("lineage", _later("lineage"), "one Parquet file with a row for every input image")
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


def _later(name: str) -> Callable[[argparse.Namespace], None]:
    """A command of `commands`, which is imported when it is asked for: it takes seconds."""

    def command(options: argparse.Namespace) -> None:
        from curation import commands

        getattr(commands, name)(options)

    return command


def _init(options: argparse.Namespace) -> None:
    starter.write(options.path, options.pool, options.like, options.output)
    print(f"wrote {options.path}; edit it, then: curate run {options.path}")


def _serve(options: argparse.Namespace) -> None:
    fields = ("runs", "host", "port", "tokens", "ray_dashboard")
    serving.serve(serving.ServeOptions(**{name: getattr(options, name) for name in fields}))


if __name__ == "__main__":
    sys.exit(main())
