"""What `pretrain train` says of settings, places and data that it can't begin with."""

from pathlib import Path

import pytest
from training import arguments, refused

from pretrain.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_tasks_of_srun_that_know_nothing_of_each_other_are_told(
    config: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert main(arguments(config, images, tmp_path / "run")) == 2
    assert "start one torchrun a node" in capsys.readouterr().err


def test_a_place_that_can_t_be_written_is_told(
    config: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(config, images, Path(f"{config}/run"))) == 2
    told = capsys.readouterr().err
    assert "Not a directory" in told
    assert str(config) in told


def test_too_few_images_for_a_batch_are_told(
    config: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["schedule.batch=32", "schedule.iterations=1", "schedule.warmup=0"]
    assert main(arguments(config, images, tmp_path / "run", *given)) == 0
    told = f"warning: {images}: 24 images in all, schedule.batch 32: a batch will hold copies"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (["model.widht=3"], "model.widht: no such setting; did you mean width?"),
        (["crops.global_size=33"], "crops.global_size 33: no multiple of model.patch_size"),
        (["schedule.batch=none", "model.heads=7"], "schedule.batch 'none'"),
        (["parallel.accumulate=3"], "schedule.batch 8: must be a multiple of 3"),
        (["crops.blur=some"], "crops.blur 'some': input should be 'paper' or 'official'"),
        (["model"], "--set model: wanted a.b=value"),
        (["model=3"], "model 3: wanted settings such as `model: {…}`"),
    ],
)
def test_faults_of_a_config_are_told(
    settings: list[str],
    fault: str,
    config: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fault in refused(capsys, *arguments(config, images, tmp_path / "run", *settings))
