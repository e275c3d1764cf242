import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.checkpoint import checkpoint_path, save_checkpoint
from pretrain.distill import DistillConfig, distill, regression_loss
from pretrain.export import read_weights
from pretrain.timm_models import build_vit, load_vit, spread_blocks
from pretrain.windows import Windows, evaluation_view, token_features

TEACHER = "deit_tiny_patch16_224"


def config(pictures: Path, weights: Path, out: Path, **changes: int) -> DistillConfig:
    given = {"depth": 1, "windows": 1, "steps": 6, "batch": 4, "checkpoint_every": 2} | changes
    return DistillConfig(TEACHER, weights, (pictures,), out, **given)


def features(vit: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return token_features(vit.forward_features(pixels))  # type: ignore[operator]


def test_the_student_comes_nearer_to_the_teacher_and_its_file_describes_itself(
    pictures: Path, teacher_weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "student.safetensors"
    distill(config(pictures, teacher_weights, out, steps=0))
    before, description = read_weights(out)
    distill(config(pictures, teacher_weights, out, steps=12))
    after, _ = read_weights(out)

    images = sorted(p for p in pictures.rglob("*.jpg") if p.name != "broken.jpg")
    pixels = Windows(images, 1, 0).batch(np.arange(8))
    wanted = features(load_vit(TEACHER, teacher_weights), pixels)
    losses = []
    for state in (before, after):
        student = build_vit(description["arch"], seed=0)
        student.load_state_dict(state)
        losses.append(float(regression_loss(features(student.eval(), pixels), wanted, 0.5)))
    assert losses[1] < 0.8 * losses[0]
    assert (description["kind"], description["dim"]) == ("semantic", 192)
    assert description["input"]["resize"] == "short_side_256_center_crop"
    assert description["card"]["images"] == 12  # the broken one is left out
    assert list(tmp_path.iterdir()) == [out]  # neither checkpoint nor teacher features stay behind


def test_a_killed_training_goes_on_to_the_same_bytes(
    pictures: Path, teacher_weights: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "a" / "s.safetensors", tmp_path / "b" / "s.safetensors"
    distill(config(pictures, teacher_weights, whole))
    # Every step slowed down, so that the kill falls between a checkpoint and the end.
    script = (
        "import sys, time, torch, pretrain.distill as d; from pathlib import Path as P;"
        "torch.set_num_threads(1); batch = d.Windows.batch;"
        "d.Windows.batch = lambda *a: (time.sleep(0.3), batch(*a))[1];"
        "d.distill(d.DistillConfig(sys.argv[1], P(sys.argv[2]), (P(sys.argv[3]),), P(sys.argv[4]),"
        " depth=1, windows=1, steps=6, batch=4, checkpoint_every=2))"
    )
    command = [sys.executable, "-c", script, TEACHER, teacher_weights, pictures, killed]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not checkpoint_path(killed).exists():
        assert process.poll() is None, "the training ended before its first checkpoint"
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not killed.exists()
    distill(config(pictures, teacher_weights, killed))
    assert killed.read_bytes() == whole.read_bytes()


def test_a_checkpoint_of_another_configuration_is_not_taken_up(
    pictures: Path, teacher_weights: Path, tmp_path: Path
) -> None:
    plain, beside = tmp_path / "s.safetensors", tmp_path / "t.safetensors"
    distill(config(pictures, teacher_weights, plain, steps=2))
    save_checkpoint(checkpoint_path(beside), "of another training", 2, {"student": {}})
    distill(config(pictures, teacher_weights, beside, steps=2))
    assert read_weights(beside)[0].keys() == read_weights(plain)[0].keys()
    assert all(
        torch.equal(v, read_weights(plain)[0][k]) for k, v in read_weights(beside)[0].items()
    )


def test_a_narrower_student_needs_no_teacher_of_its_width(
    pictures: Path, teacher_weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "narrow.safetensors"
    distill(config(pictures, teacher_weights, out, steps=1, width=64))
    tensors, description = read_weights(out)
    assert tensors["cls_token"].shape[-1] == description["dim"] == 64
    assert not [name for name in tensors if "projection" in name]


@pytest.mark.parametrize(
    ("teacher", "student", "blocks"),
    [
        (12, 6, [1, 3, 5, 7, 9, 11]),
        (12, 12, list(range(12))),
        (12, 1, [11]),
        (12, 5, [1, 3, 6, 8, 11]),
    ],
)
def test_blocks_are_spread_evenly_and_end_with_the_last(
    teacher: int, student: int, blocks: list[int]
) -> None:
    assert spread_blocks(teacher, student) == blocks


def test_windows_are_a_function_of_their_number(pictures: Path) -> None:
    images = sorted(pictures.glob("*.jpg"))[:3]
    windows = Windows(images, 4, seed=1)
    assert len(windows) == 12
    assert windows.load(5).tobytes() == windows.load(5).tobytes() != windows.load(6).tobytes()
    from PIL import Image

    with Image.open(images[1]) as image:
        assert windows.load(4).tobytes() == evaluation_view(image.convert("RGB")).tobytes()
