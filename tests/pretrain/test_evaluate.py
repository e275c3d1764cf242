"""`pretrain evaluate` on few images and with wrong settings."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from training import arguments

from pretrain.cli import main
from pretrain.knn_eval import held_out

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(config: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(arguments(config, images, out, "schedule.iterations=1", "schedule.warmup=0")) == 0
    return out


@pytest.fixture
def two(images: Path, tmp_path: Path) -> Path:
    """Two images in two classes."""
    for name in ("colour0/00.png", "colour1/01.png"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(images / name, tmp_path / name)
    return tmp_path


def evaluated(run: Path, data: Path, *given: str) -> int:
    return main(["evaluate", str(run), "--data", str(data), *given, "--workers", "0"])


def test_two_images_are_enough(run: Path, two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluated(run, two) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["train_images"], found["test_images"]) == (1, 1)
    assert found["knn_accuracy"] == found["linear_accuracy"] == 0  # of the other class


def test_one_image_is_not(run: Path, two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (two / "colour1/01.png").write_bytes(b"no image")
    assert evaluated(run, two) == 2
    assert "one labelled image only could be decoded" in capsys.readouterr().err


@pytest.mark.parametrize("count", range(2, 60))
def test_some_are_held_out_and_some_are_not(count: int) -> None:
    assert 0 < int(held_out(count).sum()) < count
    assert torch.equal(held_out(count), held_out(count))


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (["--size", "3"], "--size 3: must be 8 or more"),
        (["--size", "-8"], "--size -8: must be 8 or more"),
        (["--workers", "-1"], "--workers -1: must be 0 or more"),
    ],
)
def test_wrong_settings_are_told(
    given: list[str], fault: str, run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), "--data", str(images), *given]) == 2
    told = capsys.readouterr().err
    assert fault in told
    assert "Traceback" not in told
