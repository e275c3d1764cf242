import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pretrain.cli import main


def arguments(command: str, pictures: Path, weights: Path, tmp_path: Path) -> dict[str, str]:
    return {
        "command": command,
        "--teacher": "deit_tiny_patch16_224",
        "--teacher-weights": str(weights),
        "--images": str(pictures),
        "--out": str(tmp_path / "out.safetensors"),
    }


CASES = [
    ({"--images": "nowhere"}, "nowhere: no such folder"),
    ({"--images": "EMPTY"}, "holds no image (.bmp, .jpeg, .jpg, .png, .webp)"),
    ({"--images": "BROKEN"}, "none of the 1 image files under --images can be decoded"),
    (
        {"--teacher": "deit_tinny_patch16_224"},
        "timm has no such model; near: deit_tiny_patch16_224",
    ),
    ({"--teacher": "resnet18"}, "resnet18: not a plain ViT with 16-pixel patches"),
    ({"--teacher": "deit_tiny_distilled_patch16_224"}, "not a plain ViT with 16-pixel patches"),
    ({"--teacher": "vit_tiny_patch16_384"}, "takes (384, 384), not 224"),
    ({"--teacher-weights": "nowhere.safetensors"}, "nowhere.safetensors: no such file"),
    ({"--teacher-weights": "TEXT"}, "not a safetensors file"),
    ({"--teacher-weights": "OTHER"}, "do not fit deit_tiny_patch16_224"),
    ({"--depth": "13"}, "--depth 13: the teacher has 12 blocks"),
    ({"--batch": "0"}, "--batch 0: must be at least 1"),
    ({"--steps": "-1"}, "--steps -1: must be at least 0"),
]


@pytest.mark.parametrize("command", ["demo-encoder", "copy-descriptor"])
@pytest.mark.parametrize(("change", "message"), CASES)
def test_a_mistake_is_one_clear_line_and_status_2(
    command: str,
    change: dict[str, str],
    message: str,
    pictures: Path,
    teacher_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    (tmp_path / "text").write_text("no weights")
    save_file({"cls_token": torch.zeros(1, 1, 8)}, tmp_path / "other")
    places = {name: str(tmp_path / name.lower()) for name in ("EMPTY", "BROKEN", "TEXT", "OTHER")}
    given = arguments(command, pictures, teacher_weights, tmp_path)
    given |= {key: places.get(value, value) for key, value in change.items()}
    words = [given.pop("command")] + [word for pair in given.items() for word in pair]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"pretrain {command}: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo-encoder", "--width", "100"], "--width 100: must be a multiple of 64"),
        (["copy-descriptor", "--size", "100"], "--size 100: must be a multiple of 16"),
        (["copy-descriptor", "--batch", "5000"], "too few for --batch 5000"),
    ],
)
def test_mistakes_of_one_command(
    words: list[str],
    message: str,
    pictures: Path,
    teacher_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = arguments(words[0], pictures, teacher_weights, tmp_path)
    del given["command"]
    assert main([*words, *(word for pair in given.items() for word in pair)]) == 2
    assert message in capsys.readouterr().err


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "--help"], capture_output=True, text=True, check=True
    )
    assert "copy-descriptor" in done.stdout
    assert "demo-encoder" in done.stdout
