import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pretrain.shipped.checkpoint import checkpoint_path, save_checkpoint
from pretrain.shipped.demo_encoder import DemoEncoderConfig, demo_encoder, regression_loss
from pretrain.shipped.export import read_weights
from pretrain.shipped.timm_models import (
    build_vit,
    copy_blocks,
    load_vit,
    needed_blocks,
    student_arch,
)
from pretrain.shipped.windows import Windows, evaluation_view, token_features

TEACHER = "deit_tiny_patch16_224"


def config(pictures: Path, weights: Path, out: Path, **changes: int) -> DemoEncoderConfig:
    given = {
        "depth": 1,
        "width": 64,
        "windows": 1,
        "steps": 6,
        "batch": 4,
        "checkpoint_every": 2,
    } | changes
    return DemoEncoderConfig(TEACHER, weights, (pictures,), out, **given)


def features(vit: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return token_features(vit.forward_features(pixels))  # type: ignore[operator]


def test_the_student_comes_nearer_to_the_teacher_and_its_file_describes_itself(
    pictures: Path, teacher_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.shipped.demo_encoder.needed_blocks", lambda *_: [3])
    out = tmp_path / "student.safetensors"
    demo_encoder(config(pictures, teacher_weights, out, width=192, steps=0))
    before, description = read_weights(out)
    demo_encoder(config(pictures, teacher_weights, out, width=192, steps=12))
    after, _ = read_weights(out)

    images = sorted(p for p in pictures.rglob("*.jpg") if p.name != "broken.jpg")
    pixels = Windows(images, 1, 0).batch(np.arange(8))
    wanted = features(load_vit(TEACHER, teacher_weights), pixels)
    losses = []
    for state in (before, after):
        student = build_vit(description["arch"], seed=1)
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
    demo_encoder(config(pictures, teacher_weights, whole))
    # Every step slowed down, so that the kill falls between a checkpoint and the end.
    script = (
        "import sys, time, torch; from pathlib import Path as P;"
        "import pretrain.shipped.demo_encoder as d;"
        "torch.set_num_threads(1); batch = d.Windows.batch;"
        "d.Windows.batch = lambda *a: (time.sleep(0.3), batch(*a))[1];"
        "teacher, weights, pictures, out = sys.argv[1:];"
        "d.demo_encoder(d.DemoEncoderConfig(teacher, P(weights), (P(pictures),), P(out),"
        " depth=1, width=64, windows=1, steps=6, batch=4, checkpoint_every=2))"
    )
    command = [sys.executable, "-c", script, TEACHER, teacher_weights, pictures, killed]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not checkpoint_path(killed).exists():
        assert process.poll() is None, "the training ended before its first checkpoint"
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not killed.exists()
    demo_encoder(config(pictures, teacher_weights, killed))
    assert killed.read_bytes() == whole.read_bytes()


def test_a_checkpoint_of_another_configuration_is_not_taken_up(
    pictures: Path, teacher_weights: Path, tmp_path: Path
) -> None:
    plain, beside = tmp_path / "s.safetensors", tmp_path / "t.safetensors"
    demo_encoder(config(pictures, teacher_weights, plain, steps=2))
    save_checkpoint(checkpoint_path(beside), "of another training", 2, {"student": {}})
    demo_encoder(config(pictures, teacher_weights, beside, steps=2))
    assert read_weights(beside)[0].keys() == read_weights(plain)[0].keys()
    assert all(
        torch.equal(v, read_weights(plain)[0][k]) for k, v in read_weights(beside)[0].items()
    )


def test_a_narrower_student_needs_no_teacher_of_its_width(
    pictures: Path, teacher_weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "narrow.safetensors"
    demo_encoder(config(pictures, teacher_weights, out, steps=1, width=64))
    tensors, description = read_weights(out)
    assert tensors["cls_token"].shape[-1] == description["dim"] == 64
    assert not [name for name in tensors if "projection" in name]


def test_blocks_that_change_nothing_are_dropped_first() -> None:
    teacher = build_vit(student_arch(64, 5), seed=0).eval()
    for block in (1, 3):
        for layer in (teacher.blocks[block].attn.proj, teacher.blocks[block].mlp.fc2):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    assert needed_blocks(teacher, pixels, 3) == [0, 2, 4]
    student = build_vit(student_arch(64, 3), seed=1).eval()
    copy_blocks(teacher, student, [0, 2, 4])
    assert torch.allclose(student(pixels), teacher(pixels), atol=1e-5)


def test_what_precedes_the_first_dropped_block_stays_the_teachers(
    pictures: Path, teacher_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s.safetensors"
    monkeypatch.setattr("pretrain.shipped.demo_encoder.needed_blocks", lambda *_: [0, 1, 5])
    demo_encoder(config(pictures, teacher_weights, out, steps=1, width=192, depth=3))
    teacher, student = load_file(teacher_weights), load_file(out)
    same = {name for name, value in student.items() if torch.equal(value, teacher[name])}
    assert {"cls_token", "pos_embed", "blocks.0.mlp.fc1.weight", "blocks.1.attn.qkv.weight"} <= same
    start = teacher["blocks.5.attn.qkv.weight"].float()
    moved = (student["blocks.2.attn.qkv.weight"].float() - start).abs()
    assert 0 < moved.max() < 0.01


def test_windows_are_a_function_of_their_number(pictures: Path) -> None:
    images = sorted(pictures.glob("*.jpg"))[:3]
    windows = Windows(images, 4, seed=1)
    assert len(windows) == 12
    assert windows.load(5).tobytes() == windows.load(5).tobytes() != windows.load(6).tobytes()
    from PIL import Image

    with Image.open(images[1]) as image:
        assert windows.load(4).tobytes() == evaluation_view(image.convert("RGB")).tobytes()
