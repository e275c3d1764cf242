"""A tiny training run on real image files: how it is started, and what it leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pretrain.cli import main
from pretrain.export import load_run

TINY = """
model: {patch_size: 8, width: 48, depth: 2, heads: 3, image_size: 32, drop_path: 0.3}
objective:
  dino_head: {prototypes: 64, hidden: 64, bottleneck: 32}
  ibot_head: {prototypes: 48, hidden: 64, bottleneck: 16}
crops: {global_size: 32, local_size: 16, local_crops: 2}
schedule: {iterations: 8, batch: 8, base_lr: 0.01, warmup: 2, last_layer_freeze: 1}
data: {workers: 0}
parallel: {precision: fp32}
watch: {log_every: 1, checkpoint_every: 2, keep: 9}
"""


def arguments(config: Path, images: Path, out: Path, *settings: str) -> list[str]:
    given = ["train", "--config", str(config), "--shards", str(images), "--out", str(out)]
    return [*given, *(part for one in settings for part in ("--set", one))]


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What `pretrain` says of a user's mistake."""
    assert main(list(command)) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told


def lines(run: Path) -> list[dict[str, float]]:
    """Without what a clock says."""
    told = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("time", "images_per_s", "step_s", "data_wait")
    return [{name: value for name, value in line.items() if name not in clock} for line in told]


def state(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_run(run)[1].state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def process(*given: str, ranks: int = 1, **options: object) -> "subprocess.Popen[str]":
    start = [sys.executable, "-m", "pretrain"]
    if ranks > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start += [f"--nproc-per-node={ranks}", "-m", "pretrain"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        [*start, *given], env=environment, text=True, stderr=subprocess.PIPE, **options
    )
