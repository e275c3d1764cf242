"""What a run writes about itself: lines of JSON, bad images by name, and scalars."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import arguments, process

from pretrain.cli import main
from pretrain.config import load
from pretrain.precision import choose
from pretrain.schedules import schedules
from pretrain.shards import open_source
from pretrain.stream import Loader, StreamConfig
from pretrain.watch import Watch

pytestmark = pytest.mark.usefixtures("one_thread")


def strict(path: Path) -> list[dict[str, Any]]:
    """Lines as any JSON reader sees them: NaN and Infinity are none of its words."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.fixture
def spoilt(images: Path, tmp_path: Path) -> Path:
    """The images, and two that can't be decoded."""
    folder = tmp_path / "spoilt"
    shutil.copytree(images, folder)
    for name in ("colour0/00.png", "colour2/90.jpg"):
        (folder / name).write_bytes(b"no image")
    return folder


def remove_checkpoints(run: Path, after: int) -> None:
    """As if the run had been killed before it wrote them."""
    for path in (run / "checkpoints").iterdir():
        if int(path.name) > after:
            shutil.rmtree(path)


def test_a_loss_of_no_weight_leaves_valid_json(config: Path, images: Path, tmp_path: Path) -> None:
    settings = ["objective.ibot_weight=0", "schedule.iterations=2"]
    assert main(arguments(config, images, tmp_path / "run", *settings)) == 0
    for line in strict(tmp_path / "run" / "metrics.jsonl"):
        assert "ibot" not in line
        assert line["dino_global"] > 0


def test_what_is_not_finite_is_null(config: Path, images: Path, tmp_path: Path) -> None:
    chosen = load(str(config))
    precision = choose("fp32", torch.device("cpu"))
    loader = Loader(open_source(str(images)), chosen.crops, StreamConfig(8, workers=0))
    next(loader)
    watch = Watch(chosen, tmp_path, 0, precision)
    watch.add({"ibot": torch.tensor(torch.nan)}, torch.tensor(torch.inf))
    norms = {"backbone": torch.tensor(torch.nan), "ibot_head": torch.tensor(2.0)}
    watch.iteration(0, norms, schedules(chosen.schedule), loader, precision.scaler())
    watch.close()
    (line,) = strict(tmp_path / "metrics.jsonl")
    assert line["loss"] is line["ibot"] is line["gradient_norm/backbone"] is None
    assert line["gradient_norm/ibot_head"] == 2


def test_labelled_images_are_looked_for_before_the_first_step(
    config: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["watch.evaluate_every=4", "watch.evaluate_on=nowhere"]
    assert main(arguments(config, images, tmp_path / "run", *settings)) == 2
    told = capsys.readouterr().err
    assert "nowhere" in told
    assert "Traceback" not in told
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_bad_images_are_named_by_all_ranks_and_once(
    config: Path, spoilt: Path, tmp_path: Path
) -> None:
    """Also when a part of the run is done again, on another number of ranks."""
    out = tmp_path / "run"
    running = process(*arguments(config, spoilt, out, "watch.checkpoint_every=4"), ranks=2)
    assert running.wait() == 0, running.communicate()[1]
    told, named = strict(out / "metrics.jsonl"), strict(out / "bad.jsonl")
    assert {line["key"] for line in named} == {"colour0/00.png", "colour2/90.jpg"}
    assert {line["rank"] for line in named} == {0, 1}
    assert all(line["reason"] and "shard" in line for line in named)
    for line in named:  # four positions of eight for each rank
        assert line["position"] // 4 % 2 == line["rank"]
    counts = [sum(one["position"] < 8 * (n + 1) for one in named) for n in range(8)]
    assert [line["bad_images"] for line in told] == counts
    assert counts[3] < counts[-1]

    remove_checkpoints(out, 4)
    assert main(["resume", str(out), "--set", "parallel.accumulate=2"]) == 0
    again = strict(out / "bad.jsonl")
    assert sorted(one["position"] for one in again) == sorted(one["position"] for one in named)
    assert [line["bad_images"] for line in strict(out / "metrics.jsonl")] == counts
    assert {one["rank"] for one in again if one["position"] >= 32} == {0}


def test_bad_images_that_end_a_run_are_named(config: Path, spoilt: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(arguments(config, spoilt, out, "data.max_bad_share=0")) == 2
    assert strict(out / "bad.jsonl")


def test_a_log_says_what_runs_and_how_far_it_is(
    config: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no bar; also what is evaluated and left out is told there."""
    watched = ["watch.evaluate_every=2", f"watch.evaluate_on={images}", "schedule.iterations=4"]
    assert main(arguments(config, images, tmp_path / "run", *watched)) == 0
    told = capsys.readouterr().err
    assert (
        "iterations 0 to 4 of 8 images, 24 in all; a backbone of 0.1 M parameters in fp32" in told
    )
    assert "iteration 4 of 4: loss " in told
    assert "\niteration 2: knn_accuracy 0" in told or "\niteration 2: knn_accuracy 1" in told
    spoilt = ["schedule.base_lr=1e30", "schedule.warmup=0", "optimizer.most_skipped=2"]
    assert main(arguments(config, images, tmp_path / "spoilt", *spoilt)) == 2
    assert "\niteration 2: loss not finite, left out\n" in capsys.readouterr().err


def test_a_terminal_shows_a_bar(config: Path, images: Path, tmp_path: Path) -> None:
    shown, terminal = os.openpty()
    given = arguments(config, images, tmp_path / "run")
    running = subprocess.Popen([sys.executable, "-m", "pretrain", *given], stderr=terminal)
    os.close(terminal)
    told = b""
    with contextlib.suppress(OSError):  # how Linux ends it
        while more := os.read(shown, 4096):
            told += more
    os.close(shown)
    assert running.wait() == 0
    assert "8/8 [" in told.decode()
    assert "loss=" in told.decode()


def steps(run: Path) -> Iterator[int]:
    """Of the loss, as TensorBoard shows it."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return (scalar.step for scalar in events.Scalars("losses/loss"))


def test_tensorboard_shows_steps_that_are_done_again_once(
    config: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert main(arguments(config, images, out)) == 0
    remove_checkpoints(out, 4)
    assert main(["resume", str(out)]) == 0
    assert list(steps(out)) == list(range(1, 9))
