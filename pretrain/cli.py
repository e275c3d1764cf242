"""The `pretrain` command: DINOv2 training on shards, its evaluation and export."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pretrain.errors import UserError

if TYPE_CHECKING:
    from pretrain.config import Config
    from pretrain.train import Begin


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one message on stderr for a mistake in what the user gave."""
    given = vars(_parser().parse_args(argv))
    command = given.pop("command")
    try:
        _COMMANDS[command](**given)
    except UserError as error:
        print(f"pretrain {command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"pretrain {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"pretrain {command}: interrupted; `pretrain resume` goes on", file=sys.stderr)
        return 130
    return 0


def _train(
    config: str, shards: str, out: Path, init: Path | None, resume: bool, settings: list[str]
) -> None:
    from pretrain import checkpoint, export
    from pretrain.config import load
    from pretrain.train import Begin

    if resume and checkpoint.folders(out):
        _resume(out, settings)
        return
    below, begin = None, Begin()
    if init is not None and not init.exists():
        raise UserError(f"--init {init}: no such file of weights, nor folder of a run")
    if init is not None and init.is_file():
        begin = Begin(weights=init)
    elif init is not None:
        begin = Begin(checkpoint=checkpoint.latest(init))
        below = export.read_config(init).model_dump(mode="json")
        del below["distill"]  # a phase of its own, whose teacher may be gone
    _begin(load(config, [*settings, _setting("data.shards", shards)], below), out, begin)


def _distill(
    teacher: str, weights: str, student: str, shards: str, out: Path, settings: list[str]
) -> None:
    from pretrain import checkpoint, export
    from pretrain.config import load, shipped
    from pretrain.train import Begin

    given: dict[str, Any] = {"distill.teacher": teacher, "distill.weights": weights}
    below = None
    if Path(teacher).is_dir():  # its heads, so that the student has as many prototypes
        run = Path(teacher).resolve()
        given["distill.teacher"] = str(run)
        given["distill.iteration"] = int(checkpoint.latest(run).name)
        below = {"objective": export.read_config(run).model_dump(mode="json")["objective"]}
    given["data.shards"] = shards
    settings = [*settings, *(_setting(path, value) for path, value in given.items())]
    name = f"distill_{student}"
    chosen = load(name if name in shipped() else student, settings, below, "--student")
    _begin(chosen, out, Begin())


def _setting(path: str, value: Any) -> str:
    return f"{path}={json.dumps(value)}"


def _begin(chosen: "Config", out: Path, begin: "Begin") -> None:
    """A new run, also in the place of one that has no checkpoint yet."""
    from pretrain import checkpoint
    from pretrain.shards import open_source
    from pretrain.train import train

    if checkpoint.folders(out):
        raise UserError(f"--out {out}: holds a run; `pretrain resume {out}`, or another folder")
    _warn(chosen.warnings(int(os.environ.get("WORLD_SIZE", "1"))))
    source = open_source(chosen.data.shards, check=_is_first_rank())
    if (images := int(source.counts.sum())) < chosen.schedule.batch:
        fewer = f"{images} images in all, schedule.batch {chosen.schedule.batch}"
        _warn(
            [f"{source.uri}: {fewer}: a batch will hold copies, from which features can't spread"]
        )
    out.mkdir(parents=True, exist_ok=True)
    train(chosen, source, out, begin)


def _resume(run: Path, settings: list[str]) -> None:
    from pretrain import checkpoint, config, export
    from pretrain.shards import open_source
    from pretrain.train import Begin, train

    begin = Begin(resumed=checkpoint.latest(run))
    given = export.read_config(run).model_dump(mode="json")
    chosen = config.with_settings(given, settings, str(run))
    train(chosen, open_source(chosen.data.shards, check=_is_first_rank()), run, begin)


def _evaluate(run: Path, data: str, test: str, size: int, workers: int) -> None:
    from pretrain.evaluate import Evaluation, evaluate

    found = evaluate(run, Evaluation(data, test, size, workers=workers))
    print(json.dumps(found, indent=2))


def _export(run: Path, kind: Any, out: Path) -> None:
    from pretrain.export import export

    print(export(run, kind, out))


def _replay(file: Path, settings: list[str]) -> None:
    from pretrain.replay import replay

    for line in replay(file, settings):
        print(line)


def _doctor() -> None:
    from pretrain.doctor import doctor

    doctor()


def _shipped(command: str) -> Any:
    def run(**given: Any) -> None:
        from pretrain.shipped import cli

        cli.run(command, given)

    return run


_COMMANDS: dict[str, Any] = {
    "train": _train,
    "distill": _distill,
    "resume": _resume,
    "evaluate": _evaluate,
    "export": _export,
    "replay": _replay,
    "doctor": _doctor,
    "demo-encoder": _shipped("demo-encoder"),
    "copy-descriptor": _shipped("copy-descriptor"),
}


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings if _is_first_rank() else ():
        print(f"warning: {warning}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    from pretrain.config import shipped
    from pretrain.export import Format
    from pretrain.shipped import cli

    parser = argparse.ArgumentParser(prog="pretrain", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train DINOv2 on shards; under torchrun on many GPUs")
    train.add_argument(
        "--config", required=True, help=f"a YAML file, or one of {', '.join(shipped())}"
    )
    train.add_argument(
        "--init",
        type=Path,
        metavar="RUN|FILE",
        help="begin with the weights of a run, or of a file of DINOv2, timm or transformers",
    )
    again = "go on where --out has a checkpoint, else begin: for jobs that are started again"
    train.add_argument("--resume", action="store_true", help=again)
    distill = commands.add_parser("distill", help="train a small student of a frozen teacher")
    distill.add_argument("--teacher", required=True, help="DIR of a run, or a timm model's name")
    distill.add_argument(
        "--teacher-weights",
        dest="weights",
        default="hub",
        help="of a timm model: a file in its names or the official ones; else from the hub",
    )
    students = [name.removeprefix("distill_") for name in shipped() if name.startswith("distill_")]
    distill.add_argument(
        "--student", required=True, help=f"one of {', '.join(students)}, or a YAML file"
    )
    resume = commands.add_parser("resume", help="go on with a run from its last checkpoint")
    resume.add_argument("run", type=Path, metavar="DIR")
    for one in (train, distill):
        one.add_argument(
            "--shards", required=True, help="folder or s3://bucket/prefix: shards, tars or images"
        )
        one.add_argument("--out", type=Path, required=True, help="folder of the run")
    replay = commands.add_parser(
        "replay", help="repeat a step that was not finite, and tell where it stops being so"
    )
    replay.add_argument("file", type=Path, metavar="FILE", help="of a run's folder replay/")
    for one in (train, distill, resume, replay):
        one.add_argument(
            "--set",
            dest="settings",
            action="append",
            default=[],
            metavar="a.b=VALUE",
            help="a setting of the config; may be given again",
        )
    evaluate = commands.add_parser("evaluate", help="kNN and linear probe of a run's teacher")
    evaluate.add_argument("run", type=Path, metavar="DIR")
    evaluate.add_argument("--data", required=True, help="labelled images: a folder a class")
    evaluate.add_argument("--test", default="", help="others to test; else a fifth of --data")
    evaluate.add_argument("--size", type=int, default=0, help="pixels; else as trained")
    evaluate.add_argument("--workers", type=int, default=4)
    export = commands.add_parser("export", help="the teacher's backbone for another library")
    export.add_argument("run", type=Path, metavar="DIR")
    export.add_argument("--format", dest="kind", required=True, choices=get_args(Format))
    export.add_argument("--out", type=Path, required=True, help="folder to write")
    commands.add_parser("doctor", help="what this machine and this torch can do")
    cli.add_commands(commands)
    return parser
