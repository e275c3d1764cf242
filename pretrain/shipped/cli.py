"""Commands that train the two small encoders which curation ships."""

import argparse
from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.shipped.copy_descriptor import CopyConfig, copy_descriptor
from pretrain.shipped.demo_encoder import DemoEncoderConfig, demo_encoder


def run(command: str, given: dict[str, Any]) -> None:
    """Errors: UserError."""
    for name, low in {"steps": 0, "batch": 1, "depth": 1, "windows": 1, "seed": 0}.items():
        if given.get(name, low) < low:
            raise UserError(f"--{name} {given[name]}: must be at least {low}")
    given["images"] = tuple(given["images"])
    if command == "demo-encoder":
        demo_encoder(DemoEncoderConfig(**given))
    else:
        copy_descriptor(CopyConfig(**given))


def add_commands(commands: Any) -> None:
    """To the subparsers of `pretrain`."""
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
