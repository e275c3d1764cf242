"""The `pretrain` command: DINOv2 training on shards, its evaluation and export."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pretrain.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one message on stderr for a mistake in what the user gave."""
    given = vars(_parser().parse_args(argv))
    command = given.pop("command")
    try:
        _COMMANDS[command](**given)
    except UserError as error:
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
    from pretrain.shards import open_source
    from pretrain.train import Begin, train

    if resume and checkpoint.folders(out):
        _resume(out, settings)
        return
    if (out / checkpoint.CONFIG).exists() and not resume:
        raise UserError(f"--out {out}: holds a run; `pretrain resume {out}`, or another folder")
    below, weights = None, None
    if init is not None:
        weights = checkpoint.latest(init)
        below = export.read_config(init).model_dump(mode="json")
    chosen = load(config, [*settings, f"data.shards={json.dumps(shards)}"], below)
    _warn(chosen.warnings())
    source = open_source(chosen.data.shards)
    out.mkdir(parents=True, exist_ok=True)
    train(chosen, source, out, Begin(weights=weights))


def _resume(run: Path, settings: list[str]) -> None:
    from pretrain import checkpoint, config, export
    from pretrain.shards import open_source
    from pretrain.train import Begin, train

    begin = Begin(resumed=checkpoint.latest(run))
    given = export.read_config(run).model_dump(mode="json")
    chosen = config.with_settings(given, settings, str(run))
    train(chosen, open_source(chosen.data.shards), run, begin)


def _evaluate(run: Path, data: str, test: str, size: int, workers: int) -> None:
    from pretrain.evaluate import Evaluation, evaluate

    found = evaluate(run, Evaluation(data, test, size, workers=workers))
    print(json.dumps(found, indent=2))


def _export(run: Path, kind: Any, out: Path) -> None:
    from pretrain.export import export

    print(export(run, kind, out))


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
    "resume": _resume,
    "evaluate": _evaluate,
    "export": _export,
    "doctor": _doctor,
    "demo-encoder": _shipped("demo-encoder"),
    "copy-descriptor": _shipped("copy-descriptor"),
}


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings if os.environ.get("RANK", "0") == "0" else ():
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
        "--shards", required=True, help="folder or s3://bucket/prefix: shards, tars or images"
    )
    train.add_argument("--out", type=Path, required=True, help="folder of the run")
    train.add_argument("--init", type=Path, metavar="RUN", help="begin with the weights of a run")
    again = "go on where --out has a checkpoint, else begin: for jobs that are started again"
    train.add_argument("--resume", action="store_true", help=again)
    resume = commands.add_parser("resume", help="go on with a run from its last checkpoint")
    resume.add_argument("run", type=Path, metavar="DIR")
    for one in (train, resume):
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
