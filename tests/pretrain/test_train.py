"""`pretrain train` and what follows it, on a tiny model and real image files."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from training import arguments, lines, process, same, state

from pretrain.cli import main
from pretrain.export import load_run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(config: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(arguments(config, images, out)) == 0
    return out


def test_every_iteration_is_told_and_the_student_learns(whole: Path) -> None:
    told = lines(whole)
    assert [line["iteration"] for line in told] == list(range(1, 9))
    for name in ("loss", "dino_global", "dino_local", "ibot", "koleo", "teacher_entropy"):
        assert all(np.isfinite(line[name]) for line in told)
    assert told[0]["last_layer_lr"] == 0 < told[1]["last_layer_lr"]
    assert told[-1]["epoch"] == pytest.approx(8 * 8 / 24)
    student, teacher = load_run(whole)[1].student, load_run(whole)[1].teacher
    assert not same(dict(student.state_dict()), dict(teacher.state_dict()))


@pytest.mark.parametrize("after", [1, 4])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    after: int, whole: Path, config: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    running = process(*arguments(config, images, out))
    metrics = out / "metrics.jsonl"
    while running.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= after:
            break
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    if not list((out / "checkpoints").glob("0*[0-9]")):
        assert main(["resume", str(out)]) == 2  # nothing to go on from
        return
    assert main(["resume", str(out)]) == 0
    assert lines(out) == lines(whole)
    assert same(state(out), state(whole))


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_train_and_one_goes_on(
    mode: str, config: Path, images: Path, tmp_path: Path
) -> None:
    settings = [f"parallel.mode={mode}", "watch.checkpoint_every=4", "objective.koleo_weight=0"]
    out = tmp_path / mode
    training = process(*arguments(config, images, out, *settings), ranks=2)
    assert training.wait() == 0, training.communicate()[1]
    told = lines(out)
    assert [line["iteration"] for line in told] == list(range(1, 9))
    (out / "checkpoints" / "00000008").rename(tmp_path / "last")
    assert main(["resume", str(out), "--set", "parallel.accumulate=2"]) == 0
    alone = lines(out)
    assert [line["iteration"] for line in alone] == list(range(1, 9))
    assert alone[:4] == told[:4]
    # Same images, masks and weights; Sinkhorn now balances half as many at a time.
    assert alone[4]["loss"] == pytest.approx(told[4]["loss"], rel=0.2)


def test_ddp_and_fsdp_do_the_same(config: Path, images: Path, tmp_path: Path) -> None:
    losses = []
    for mode in ("ddp", "fsdp"):
        given = arguments(config, images, tmp_path / mode, f"parallel.mode={mode}")
        training = process(*given, ranks=2)
        assert training.wait() == 0, training.communicate()[1]
        losses.append([line["loss"] for line in lines(tmp_path / mode)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_batches_that_are_accumulated_stand_for_ranks(
    config: Path, images: Path, tmp_path: Path
) -> None:
    """With a centre that stays, a batch's targets depend on no other of the same step."""
    settings = ["objective.centering=softmax", "objective.center_momentum=1.0"]
    settings += ["schedule.iterations=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(arguments(config, images, one, *settings, "parallel.accumulate=2")) == 0
    training = process(*arguments(config, images, two, *settings), ranks=2)
    assert training.wait() == 0, training.communicate()[1]
    assert lines(one)[0]["loss"] == pytest.approx(lines(two)[0]["loss"], rel=1e-5)
    assert lines(one)[0]["gradient_norm/backbone"] == pytest.approx(
        lines(two)[0]["gradient_norm/backbone"], rel=1e-4
    )


def test_steps_that_are_not_finite_are_kept_and_then_stop_the_run(
    config: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["schedule.base_lr=1e30", "schedule.warmup=0", "optimizer.most_skipped=3"]
    assert main(arguments(config, images, tmp_path / "run", *settings)) == 2
    assert "not finite in 3 steps in a row" in capsys.readouterr().err
    kept = sorted((tmp_path / "run" / "replay").glob("*.pt"))
    assert len(kept) == 3
    replay = torch.load(kept[0], weights_only=False)
    assert replay["global_crops"].shape == (16, 3, 32, 32)
    assert len(replay["keys"]) == 8


def test_a_full_disk_leaves_the_last_good_checkpoint(
    config: Path, images: Path, tmp_path: Path
) -> None:
    import resource

    out = tmp_path / "run"
    assert main(arguments(config, images, out, "schedule.iterations=2", "schedule.warmup=1")) == 0
    size = max(path.stat().st_size for path in (out / "checkpoints").rglob("*"))
    limit: Callable[[], None] = lambda: resource.setrlimit(  # noqa: E731
        resource.RLIMIT_FSIZE, (size // 2, size // 2)
    )
    given = ["resume", str(out), "--set", "schedule.iterations=6"]
    running = process(*given, preexec_fn=limit)
    told = running.communicate()[1]
    assert running.returncode == 2, told
    assert "can't be written" in told
    assert "Traceback" not in told
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["00000002"]
    assert main(given) == 0


def test_the_518_phase_begins_with_a_run(
    config: Path, whole: Path, images: Path, tmp_path: Path
) -> None:
    larger = tmp_path / "larger.yaml"
    larger.write_text("crops: {global_size: 64}\nschedule: {iterations: 2, warmup: 0}\n")
    out = tmp_path / "larger"
    given = arguments(larger, images, out)
    assert main([*given, "--init", str(whole)]) == 0
    assert load_run(out)[0].model == load_run(whole)[0].model
    assert lines(out)[0]["loss"] > 0


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (["model.widht=3"], "model.widht: no such setting; did you mean width?"),
        (["crops.global_size=33"], "crops.global_size 33: no multiple of model.patch_size"),
        (["schedule.batch=none", "model.heads=7"], "schedule.batch 'none'"),
        (["parallel.accumulate=3"], "schedule.batch 8: must be a multiple of 3"),
        (["crops.blur=some"], "crops.blur 'some': input should be 'paper' or 'official'"),
        (["model"], "--set model: wanted a.b=value"),
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
    assert main(arguments(config, images, tmp_path / "run", *settings)) == 2
    told = capsys.readouterr().err
    assert fault in told
    assert "Traceback" not in told


def test_mistakes_with_runs_are_told(
    whole: Path, config: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(config, images, whole)) == 2
    assert f"holds a run; `pretrain resume {whole}`" in capsys.readouterr().err
    assert main(["resume", str(tmp_path)]) == 2
    assert "no run of `pretrain train`" in capsys.readouterr().err
    assert main(["resume", str(whole), "--set", "model.width=96"]) == 2
    assert "of another architecture" in capsys.readouterr().err
    assert main(["train", "--config", "vitb41", "--shards", ".", "--out", "x"]) == 2
    assert "did you mean vitb14?" in capsys.readouterr().err


def test_a_job_that_is_started_again_goes_on(
    whole: Path, config: Path, images: Path, tmp_path: Path
) -> None:
    """With --resume the same command begins a run, also one that came to no checkpoint."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for name in ("00000006", "00000008"):
        shutil.rmtree(out / "checkpoints" / name)
    assert main([*arguments(config, images, out), "--resume"]) == 0
    assert lines(out) == lines(whole)
    shutil.rmtree(out / "checkpoints")
    assert main([*arguments(config, images, out), "--resume"]) == 0
    assert lines(out) == lines(whole)


def test_evaluate_tells_classes_apart(
    whole: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["evaluate", str(whole), "--data", str(images), "--test", str(images), "--workers", "0"]
    assert main(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["classes"], found["train_images"], found["test_images"]) == (3, 24, 24)
    assert found["linear_accuracy"] > 0.9  # colours show even through a hardly trained network
    assert 1 <= found["feature_rank"] <= 24


def test_doctor_says_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert torch.__version__ in told
    assert "precision" in told
    assert "TFLOP/s" in told
