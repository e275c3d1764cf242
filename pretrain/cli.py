"""The `pretrain` command: `demo-encoder` and `copy-descriptor`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.errors import UserError
from pretrain.shipped.copy_descriptor import CopyConfig, copy_descriptor
from pretrain.shipped.demo_encoder import DemoEncoderConfig, demo_encoder


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on stderr for a mistake in what the user gave."""
    arguments = _parser().parse_args(argv)
    given = {key: value for key, value in vars(arguments).items() if key != "command"}
    given["images"] = tuple(arguments.images)
    try:
        _check_least(arguments, {"steps": 0, "batch": 1, "depth": 1, "windows": 1, "seed": 0})
        if arguments.command == "demo-encoder":
            demo_encoder(DemoEncoderConfig(**given))
        else:
            copy_descriptor(CopyConfig(**given))
    except UserError as error:
        print(f"pretrain {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _check_least(arguments: argparse.Namespace, least: dict[str, int]) -> None:
    for name, low in least.items():
        value = getattr(arguments, name, low)
        if value < low:
            raise UserError(f"--{name} {value}: must be at least {low}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pretrain", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo_parser = commands.add_parser(
        "demo-encoder", help="a small ViT/16 learns a larger timm encoder's features"
    )
    _common(demo_parser, DemoEncoderConfig.depth, DemoEncoderConfig.batch, DemoEncoderConfig.lr)
    demo_parser.add_argument("--width", type=int, default=192, help="channels of the student")
    demo_parser.add_argument("--windows", type=int, default=6, help="windows of each image")
    copy_parser = commands.add_parser(
        "copy-descriptor", help="a descriptor that finds edited copies, by the SSCD recipe"
    )
    _common(copy_parser, CopyConfig.depth, CopyConfig.batch, CopyConfig.lr)
    copy_parser.add_argument("--size", type=int, default=160, help="side of the input in pixels")
    return parser


def _common(parser: argparse.ArgumentParser, depth: int, batch: int, lr: float) -> None:
    parser.add_argument("--teacher", required=True, help="name of a timm ViT/16")
    parser.add_argument("--teacher-weights", type=Path, required=True, help=".safetensors")
    parser.add_argument("--images", type=Path, nargs="+", required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, help=".safetensors to write")
    parser.add_argument("--depth", type=int, default=depth, help="blocks")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=batch, help="images of a step")
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--seed", type=int, default=0)
