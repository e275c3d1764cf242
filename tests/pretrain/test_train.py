"""`pretrain train` and what follows it, on a tiny model and real image files."""

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from training import arguments, lines, process, same, state

from pretrain import distributed
from pretrain.checkpoint import latest
from pretrain.cli import main
from pretrain.config import load
from pretrain.errors import UserError
from pretrain.export import load_run, read_config
from pretrain.shards import open_source
from pretrain.train import Begin, Training

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


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


@pytest.mark.slow
def test_ddp_and_fsdp_do_the_same(config: Path, images: Path, tmp_path: Path) -> None:
    losses = []
    for mode in ("ddp", "fsdp"):
        given = arguments(config, images, tmp_path / mode, f"parallel.mode={mode}")
        training = process(*given, ranks=2)
        assert training.wait() == 0, training.communicate()[1]
        losses.append([line["loss"] for line in lines(tmp_path / mode)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.slow
def test_one_rank_goes_on_as_two_would_have(config: Path, images: Path, tmp_path: Path) -> None:
    """Within rounding, where no loss looks across the images of a rank."""
    settings = ["objective.centering=softmax", "objective.center_momentum=1.0"]
    settings += ["objective.koleo_weight=0", "watch.checkpoint_every=4", "parallel.mode=fsdp"]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    training = process(*arguments(config, images, whole, *settings), ranks=2)
    assert training.wait() == 0, training.communicate()[1]
    shutil.copytree(whole, halved)
    shutil.rmtree(halved / "checkpoints" / "00000008")
    assert main(["resume", str(halved), "--set", "parallel.accumulate=2"]) == 0
    for told, expected in zip(lines(halved), lines(whole), strict=True):
        assert told["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_a_checkpoint_counts_as_soon_as_it_is_written(
    config: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not only when the next one is saved: here the run ends before that, by a mistake."""
    settings = ["schedule.batch=8", "watch.checkpoint_every=4", "schedule.iterations=9"]
    out = tmp_path / "run"
    changed = tmp_path / "images"
    shutil.copytree(images, changed)
    running = process(*arguments(config, changed, out, *settings))
    while not (out / "metrics.jsonl").exists() or len(lines(out)) < 4:
        assert running.poll() is None
        time.sleep(0.01)
    for path in changed.rglob("*.png"):
        path.write_bytes(b"")
    told = running.communicate()[1]
    assert running.returncode in (0, 2), told
    assert "00000004" in [path.name for path in (out / "checkpoints").iterdir()]


def test_a_full_disk_at_resume_leaves_the_config(whole: Path, tmp_path: Path) -> None:
    import resource

    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = (run / "config.yaml").read_text()
    limit: Callable[[], None] = lambda: resource.setrlimit(  # noqa: E731
        resource.RLIMIT_FSIZE, (0, 0)
    )
    given = ["resume", str(run), "--set", "schedule.iterations=10"]
    running = process(*given, preexec_fn=limit)
    told = running.communicate()[1]
    assert running.returncode == 2, told
    assert "Traceback" not in told
    assert (run / "config.yaml").read_text() == before
    assert main(given) == 0


def test_a_resumed_run_has_the_optimizer_that_it_is_told(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    settings = ["optimizer.betas=[0.5, 0.6]", "optimizer.layer_decay=0.5"]
    given = [part for one in (*settings, "schedule.iterations=9") for part in ("--set", one)]
    assert main(["resume", str(run), *given]) == 0
    config = read_config(run)
    training = Training(
        config, open_source(config.data.shards), run, Begin(resumed=latest(run)), CPU
    )
    assert {group["betas"] for group in training.optimizer.param_groups} == {(0.5, 0.6)}
    assert len({group["lr_multiplier"] for group in training.optimizer.param_groups}) > 2
    assert all(state["step"] == 9 for state in training.optimizer.state.values())


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda folder: (folder / "progress.json").write_text("{"), "damaged"),
        (lambda folder: (folder / ".metadata").write_bytes(b""), "damaged"),
        (
            lambda folder: next(folder.glob("*.distcp")).write_bytes(b"x"),
            "(Weights only load failed)",
        ),
        (lambda folder: next(folder.glob("*.distcp")).unlink(), "No such file"),
    ],
)
def test_damaged_checkpoints_are_told(
    damage: Callable[[Path], object],
    fault: str,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    damage(run / "checkpoints" / "00000008")
    assert main(["resume", str(run)]) == 2
    told = capsys.readouterr().err
    assert fault in told
    assert "00000008" in told
    assert "remove that folder" in told
    shutil.rmtree(run / "checkpoints" / "00000008")
    assert main(["resume", str(run)]) == 0


@pytest.mark.slow
def test_a_skipped_step_leaves_nothing_behind_when_sharded(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        skip_then_step, (str(tmp_path), port), nprocs=2, start_method="spawn"
    )
    assert len(list(tmp_path.glob("*.npy"))) == 2


def skip_then_step(number: int, folder: str, port: int) -> None:
    """Gradients after a step whose second batch was not finite are those of the step alone."""
    torch.set_num_threads(1)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {"RANK": number, "WORLD_SIZE": 2, **place}
    os.environ |= {name: str(value) for name, value in environment.items()}
    found = []
    with distributed.process_group(CPU):
        for skips in (True, False):
            model = nn.Linear(4, 4)
            nn.init.ones_(model.weight)
            spread = distributed.Spread(model, "fsdp", [(model, None)])
            for last, scale in ((False, 100.0), (True, float("nan"))) if skips else ():
                with spread.accumulating(last=last):
                    (spread(torch.ones(2, 4)).sum() * scale).backward()
            model.zero_grad()
            with spread.accumulating(last=True):
                spread(torch.ones(2, 4)).sum().backward()
            found.append(distributed.whole(model.weight.grad).clone())
    torch.testing.assert_close(found[0], found[1])
    np.save(f"{folder}/{number}.npy", 1)


def test_gradients_that_never_become_finite_stop_an_fp16_run(
    config: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its scale falls at each; below 1 they are not finite for another reason."""
    settings = ["parallel.precision=fp16", "optimizer.most_skipped=3", "schedule.iterations=40"]
    config_, source = load(str(config), settings), open_source(str(images))
    training = Training(config_, source, tmp_path, Begin(), CPU)
    next(training.model.student.parameters()).register_hook(lambda g: g * float("nan"))
    with pytest.raises(UserError, match="gradients not finite in 3 steps in a row"):
        training.run()
    assert training.iteration < 25


def test_a_run_that_has_no_checkpoint_yet_is_begun_again(
    config: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text("model: {}\n")
    assert main(arguments(config, images, out)) == 0
    assert len(lines(out)) == 8


@pytest.mark.slow
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


def test_a_run_that_is_done_says_so(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert main(["resume", str(run)]) == 0
    assert f"{run}: all 8 iterations (schedule.iterations) are done" in capsys.readouterr().err
    before = (run / "config.yaml").read_text()
    assert main(["resume", str(run), "--set", "schedule.iterations=7"]) == 2
    assert "schedule.iterations 7: " in (told := capsys.readouterr().err)
    assert "00000008 has done 8 already" in told
    assert (run / "config.yaml").read_text() == before


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
