"""A step that was not finite is kept, and `pretrain replay` finds where that began."""

from pathlib import Path

import pytest
import torch
from training import arguments, process

from pretrain.cli import main
from pretrain.config import load
from pretrain.shards import open_source
from pretrain.train import Begin, Training

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def replayed(path: Path, capsys: pytest.CaptureFixture[str], *settings: str) -> str:
    capsys.readouterr()
    assert main(["replay", str(path), *(p for one in settings for p in ("--set", one))]) == 0
    return capsys.readouterr().out


def test_weights_that_overflow_are_found(
    config: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first step is finite, and makes weights that the second one can't use."""
    out = tmp_path / "run"
    settings = ["schedule.base_lr=1e30", "schedule.warmup=0", "optimizer.most_skipped=3"]
    assert main(arguments(config, images, out, *settings)) == 2
    assert "see `pretrain replay` with a file of" in capsys.readouterr().err
    kept = sorted(path.name for path in (out / "replay").iterdir())
    assert kept == [
        "00000001.rank0.pt", "00000001.weights", "00000002.rank0.pt", "00000003.rank0.pt"
    ]  # fmt: skip
    for name in ("00000001.rank0.pt", "00000003.rank0.pt"):
        told = replayed(out / "replay" / name, capsys)
        assert "first module whose output is not finite: teacher.backbone.blocks.0" in told
        assert "8 images" in told
        assert "nan" in told.split("  loss ")[1].split("\n")[0]


def test_one_bad_module_is_named_and_nothing_else(
    config: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses of a step that is finite are those that the run itself had."""
    chosen = load(str(config), [f"data.shards={images}", "optimizer.most_skipped=1"])
    training = Training(chosen, open_source(str(images)), tmp_path, Begin(), CPU)
    with torch.no_grad():
        training.model.student["backbone"].blocks[1].mlp.fc1.bias[3] = torch.inf
    with pytest.raises(Exception, match="not finite in 1 steps"):
        training.run()
    told = replayed(tmp_path / "replay" / "00000000.rank0.pt", capsys)
    assert "weights that are not finite: 1, the first is student.backbone.blocks.1.mlp.fc1" in told
    assert "output is not finite: student.backbone.blocks.1" in told


def test_gradients_that_overflow_are_found(
    config: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a loss that is still finite; with another weight all is."""
    out = tmp_path / "run"
    settings = ["objective.dino_weight=1e37", "optimizer.most_skipped=1"]
    assert main(arguments(config, images, out, *settings)) == 2
    assert "gradients not finite in 1 steps" in capsys.readouterr().err
    path = out / "replay" / "00000000.rank0.pt"
    told = replayed(path, capsys)
    assert "first parameter whose gradient is not finite: student.dino_head" in told
    assert "module" not in told
    assert "all is finite here" in replayed(path, capsys, "objective.dino_weight=1")


@pytest.mark.slow
def test_the_step_of_two_ranks_is_kept_by_both(
    config: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the weights of both, which one process reads."""
    out = tmp_path / "run"
    settings = ["schedule.base_lr=1e30", "schedule.warmup=0", "optimizer.most_skipped=2"]
    running = process(*arguments(config, images, out, *settings, "parallel.mode=fsdp"), ranks=2)
    assert "not finite in 2 steps in a row" in running.communicate()[1]
    for rank in (0, 1):
        told = replayed(out / "replay" / f"00000001.rank{rank}.pt", capsys)
        assert f"batch {rank} of the step: 4 images" in told
        assert "as they were then" in told
        assert "first module whose output is not finite" in told


def test_other_files_are_told(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, fault in (
        (config.parent / "none.pt", "No such file"),
        (config, "no batch of a run's folder replay/"),
    ):
        assert main(["replay", str(path)]) == 2
        told = capsys.readouterr().err
        assert f"pretrain replay: {path}: {fault}" in told
        assert len(told.splitlines()) == 1
