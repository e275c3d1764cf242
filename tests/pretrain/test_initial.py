"""`pretrain train --init FILE`: weights of other libraries, and what is no such file."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_vit import randomised
from training import arguments, process, same

from pretrain.cli import main
from pretrain.config import Config, load
from pretrain.export import load_run
from pretrain.initial import begin_with
from pretrain.student_teacher import StudentTeacher
from pretrain.vit import ViT

pytestmark = pytest.mark.usefixtures("one_thread")
STILL = ("schedule.iterations=1", "schedule.warmup=0", "schedule.momentum=1.0")
SHAPE = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "num_classes": 0}


def crops(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def made(config: Path, *settings: str) -> StudentTeacher:
    chosen: Config = load(str(config), settings)
    return StudentTeacher(chosen.model, chosen.objective).eval()


def features(network: torch.nn.Module, side: int) -> torch.Tensor:
    with torch.no_grad():
        (seen,) = network([crops(side)])
    return torch.cat([seen.cls[:, None], seen.patches], dim=1)


def official(config: Path, **changed: object) -> ViT:
    """A backbone as released: its positions lie on a grid of 518 pixels."""
    given = {"image_size": 512, **changed}
    return randomised(ViT(replace(load(str(config)).model, **given))).eval()


@pytest.mark.parametrize("name", ["dinov2", "augreg"])
@pytest.mark.parametrize("registers", [0, 4])
def test_a_run_begins_with_what_timm_computes(
    name: str, registers: int, config: Path, tmp_path: Path
) -> None:
    """Also with models that have no LayerScale, and for crops of the size that positions have."""
    kind = "vit_small_patch14_dinov2" if name == "dinov2" else "vit_small_patch16_224"
    scales = {"init_values": 1e-5 if name == "dinov2" else None}
    extra = {"reg_tokens": registers, "no_embed_class": registers > 0}
    theirs = randomised(timm.create_model(kind, img_size=32, **SHAPE, **scales, **extra)).eval()
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    model = made(config, f"model.registers={registers}")
    told = begin_with(tmp_path / "timm.safetensors", model)
    assert "no heads" in told
    with torch.no_grad():
        found = theirs.forward_features(crops(32))
    expected = torch.cat([found[:, :1], found[:, 1 + registers :]], dim=1)
    for networks in (model.student, model.teacher):
        torch.testing.assert_close(
            features(networks["backbone"], 32), expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("registers", [0, 4])
def test_positions_of_another_grid_are_resized_as_in_training(
    registers: int, config: Path, tmp_path: Path
) -> None:
    released = official(config, registers=registers)
    torch.save(released.state_dict(), tmp_path / "official.pth")
    model = made(config, f"model.registers={registers}")
    told = begin_with(tmp_path / "official.pth", model)
    assert "positions resized to 4 x 4" in told
    expected = features(released, 32)
    torch.testing.assert_close(features(model.student["backbone"], 32), expected)
    torch.testing.assert_close(features(model.teacher["backbone"], 32), expected)


def test_heads_of_a_training_checkpoint_come_too(config: Path, tmp_path: Path) -> None:
    """Of the teacher, whose names lie beside the student's."""
    given = made(config)
    for network in given.teacher.values():
        randomised(network)
    both = {"teacher": given.teacher, "student": given.student}
    state = {f"{who}.{n}": v for who, nets in both.items() for n, v in nets.state_dict().items()}
    torch.save({"model": state, "iteration": 3}, tmp_path / "model.pth")
    model = made(config)
    assert "backbone, dino_head, ibot_head" in begin_with(tmp_path / "model.pth", model)
    assert same(model.student.state_dict(), given.teacher.state_dict())
    assert same(model.teacher.state_dict(), given.teacher.state_dict())


def test_the_command_trains_from_there(
    config: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The student takes one small step, its average none."""
    released = official(config)
    torch.save(released.state_dict(), tmp_path / "official.pth")
    given = arguments(config, images, tmp_path / "run", *STILL)
    assert main([*given, "--init", str(tmp_path / "official.pth")]) == 0
    assert "no heads: they begin at random" in capsys.readouterr().err
    teacher = load_run(tmp_path / "run")[1].teacher["backbone"]
    torch.testing.assert_close(features(teacher, 32), features(released, 32))


@pytest.mark.slow
def test_sharded_ranks_begin_there_too(config: Path, images: Path, tmp_path: Path) -> None:
    released = official(config)
    torch.save(released.state_dict(), tmp_path / "official.pth")
    given = arguments(config, images, tmp_path / "run", *STILL, "parallel.mode=fsdp")
    running = process(*given, "--init", str(tmp_path / "official.pth"), ranks=2)
    told = running.communicate()[1]
    assert running.returncode == 0, told
    assert told.count("they begin at random") == 1
    teacher = load_run(tmp_path / "run")[1].teacher["backbone"]
    torch.testing.assert_close(features(teacher, 32), features(released, 32))


def test_other_files_are_told(
    config: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, heads = official(config).state_dict(), made(config).teacher.state_dict()
    incomplete = {name: value for name, value in state.items() if name != "blocks.1.norm2.bias"}
    files = {
        "model.width is 96 there, 48 here": official(config, width=96).state_dict(),
        "model.patch_size is 16 there, 8 here": official(config, patch_size=16).state_dict(),
        "model.registers is 4 there, 0 here": official(config, registers=4).state_dict(),
        "model.depth is 3 there, 2 here; model.ffn is swiglu there, mlp here": official(
            config, depth=3, ffn="swiglu"
        ).state_dict(),
        "it lacks backbone.blocks.1.norm2.bias": incomplete,
        "it has backbone.dist_token": {**state, "dist_token": torch.zeros(1, 1, 48)},
        "dino_head.last_layer.weight_g is (3, 1) there, (64, 1) here": {
            **heads, "dino_head.last_layer.weight_g": torch.ones(3, 1)
        },
        "no weights of a vision transformer: neither": timm.create_model("resnet18").state_dict(),
    }  # fmt: skip
    path = tmp_path / "w.safetensors"
    for fault, held in files.items():
        save_file({name: value.contiguous() for name, value in held.items()}, path)
        refused(arguments(config, images, tmp_path / "run"), path, fault, capsys)
    path.write_bytes(b"no weights")
    refused(arguments(config, images, tmp_path / "run"), path, "no weights of a vision", capsys)
    nothing = tmp_path / "nothing.pth"
    refused(arguments(config, images, tmp_path / "run"), nothing, "no such file", capsys)


def refused(given: list[str], init: Path, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*given, "--init", str(init)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"pretrain train: --init {init}: ")
    assert fault in told
