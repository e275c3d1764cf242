"""Distillation: what a frozen teacher says, and a student that learns from it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional
from training import arguments, lines, process, refused, same, state

from pretrain import export
from pretrain.checkpoint import latest, read
from pretrain.cli import main
from pretrain.config import Config, DistillConfig, load, shipped
from pretrain.errors import UserError
from pretrain.frozen import Anchors, fill_anchors, load_teacher
from pretrain.heads import HeadConfig
from pretrain.losses.centering import sinkhorn_knopp
from pretrain.masking import hide_nothing
from pretrain.student_teacher import Batch, ObjectiveConfig, StudentTeacher
from pretrain.vit import ViT, ViTConfig

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS = ObjectiveConfig(HeadConfig(64, 32, 16), HeadConfig(48, 32, 16))


def student(teacher: str, weights: str = "hub", patch: int = 8, crop: int = 32) -> Config:
    vit = ViTConfig(patch_size=patch, width=32, depth=2, heads=2, image_size=crop)
    shape = {"global_size": crop, "local_size": 2 * patch, "local_crops": 2}
    given = {"model": vit, "objective": HEADS, "crops": shape}
    return Config.model_validate({**given, "distill": DistillConfig(teacher, weights)})


def crops(count: int = 6, side: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


@pytest.fixture(scope="module")
def teacher(config: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is wider than its students."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    assert main(arguments(config, images, out, "model.width=96")) == 0
    return out


def distill(teacher: str, config: Path, images: Path, out: Path, *settings: str) -> list[str]:
    given = arguments(config, images, out, "model.drop_path=0.0", *settings)
    return ["distill", "--teacher", teacher, "--student", *given[2:]]


def test_targets_are_the_frozen_teachers(teacher: Path) -> None:
    """Of the other view for class tokens, of every patch, with the heads of its run."""
    config = student(str(teacher))
    made = StudentTeacher(config.model, HEADS, frozen=load_teacher(config)).train()
    with torch.no_grad():
        for parameter in made.student.parameters():
            parameter += 0.1
    both = crops()
    targets = made.targets(Batch(both, crops(0, 16), hide_nothing(6, 4)), 0.05)
    run = export.load_run(teacher)[1].teacher
    with torch.no_grad():
        (seen,) = run["backbone"]([both])
        swapped = torch.cat([seen.cls[3:], seen.cls[:3]])
        dino = sinkhorn_knopp(run["dino_head"](swapped), 0.05, 3)
        ibot = sinkhorn_knopp(run["ibot_head"](seen.patches.flatten(0, 1)), 0.05, 3)
    for kind, expected in (("dino", dino), ("ibot", ibot)):
        mine = targets[kind].rows(0, len(targets[kind]))
        torch.testing.assert_close(mine, expected.rows(0, len(expected)))


def test_nothing_is_hidden_and_every_patch_counts_alike() -> None:
    masks = hide_nothing(4, 3)
    assert not masks.tokens.any()
    assert masks.indices.tolist() == list(range(36))
    assert float(masks.weights.sum()) == pytest.approx(4)


def test_a_teacher_of_another_patch_size_sees_as_many_patches(teacher: Path) -> None:
    config = student(str(teacher), patch=4, crop=16)
    made = StudentTeacher(config.model, HEADS, frozen=load_teacher(config))
    targets = made.targets(Batch(crops(6, 16), crops(0, 8), hide_nothing(6, 4)), 0.05)
    assert targets["ibot"].rows(0, 6 * 16).shape == (6 * 16, 48)


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        ("test_vit", 16),
        ("test_vit2", 16),
        ("resnet18", 32),
        ("efficientnet_b0", 32),  # its last convolution widens what its last stage gives
        ("swin_tiny_patch4_window7_224", 32),
    ],
)
def test_timm_models_teach(name: str, patch: int, tmp_path: Path) -> None:
    """With and without class token and registers, convolutional, channels last."""
    torch.manual_seed(0)
    size = {"img_size": 2 * patch} if "_vit" in name or "swin" in name else {}
    plain = timm.create_model(name, num_classes=0, **size).eval()
    save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    config = student(name, str(tmp_path / "weights.safetensors"), crop=16)
    networks = load_teacher(config)
    batch = crops(4, 16)
    with torch.no_grad():
        (seen,) = networks["backbone"]([batch], patches=torch.tensor([0, 3, 15]))
        larger = functional.interpolate(batch, 2 * patch, mode="bicubic", antialias=True)
        given = plain.pretrained_cfg
        mean, std = (torch.tensor(given[n]).view(3, 1, 1) for n in ("mean", "std"))
        pixels = larger * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        pixels = pixels + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        found = plain.forward_features((pixels - mean) / std)
    if found.ndim == 4 and "swin" not in name:
        grid, cls = found.flatten(2).transpose(1, 2), found.mean(dim=(2, 3))
    elif "swin" in name:
        grid, cls = found.flatten(1, 2), found.mean(dim=(1, 2))
    else:
        first = plain.num_prefix_tokens
        grid, cls = found[:, first:], found[:, 0]
        if name == "test_vit2":  # registers, but no class token
            cls = grid.mean(dim=1)
    torch.testing.assert_close(seen.cls, cls, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(seen.patches, grid.flatten(0, 1)[[0, 3, 15]], rtol=1e-3, atol=1e-4)
    assert seen.cls.shape[1] == networks["dino_head"].mean.shape[0]


def test_anchors_score_by_cosine_to_images_that_were_seen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    config = student("test_vit", str(tmp_path / "w.safetensors"))
    networks = load_teacher(config)
    batches = [crops(count, 32) for count in (20, 30, 40)]
    fill_anchors(networks, batches, torch.Generator().manual_seed(0))
    dino = networks["dino_head"]
    assert isinstance(dino, Anchors)
    with torch.no_grad():
        rows = torch.cat([networks["backbone"]([batch])[0].cls for batch in batches])[:64]
        scores = dino(rows).rows(0, 64)
    rows = functional.normalize(rows - rows.mean(dim=0), dim=1)
    torch.testing.assert_close(scores, rows @ rows.T, rtol=1e-4, atol=1e-5)
    assert networks["ibot_head"].features.norm(dim=1).allclose(torch.ones(48))


def prefixed(state: dict[str, torch.Tensor]) -> dict[str, object]:
    """As the official code saves a training checkpoint, with heads."""
    inside = {f"backbone.{name}": value for name, value in state.items()}
    return {"teacher": {**inside, "dino_head.mlp.0.weight": torch.ones(2, 2)}, "iteration": 3}


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("form", ["hub", "checkpoint"])
def test_official_weights_teach(registers: int, form: str, tmp_path: Path) -> None:
    """A file of the official names gives timm's model what our own network computes with it."""
    vit = ViTConfig(width=384, depth=12, heads=6, image_size=518, registers=registers)
    released = {"interpolate_offset": 0.0, "interpolate_antialias": True}
    torch.manual_seed(0)
    ours = ViT(replace(vit, **released)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    state = ours.state_dict()
    torch.save(state if form == "hub" else prefixed(state), tmp_path / "official.pth")
    name = f"vit_small_patch14_{'reg4_' if registers else ''}dinov2"
    config = student(name, str(tmp_path / "official.pth"), patch=14, crop=56)
    images = crops(2, 56)
    with torch.no_grad():
        (seen,) = load_teacher(config)["backbone"]([images])
        (expected,) = ours([images])
    torch.testing.assert_close(seen.cls, expected.cls, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(seen.patches, expected.patches, rtol=2e-3, atol=2e-3)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    """Else a randomly initialised teacher would go unnoticed."""
    path = tmp_path / "w.safetensors"
    state = timm.create_model("test_vit").state_dict()
    del state["blocks.1.norm1.bias"]
    files = {"lacks blocks.1.norm1.bias": state}
    files["it lacks cls_token"] = timm.create_model("resnet18").state_dict()
    for fault, held in files.items():
        save_file(held, path)
        with pytest.raises(UserError, match=f"not weights of test_vit.*{fault}"):
            load_teacher(student("test_vit", str(path)))


def test_a_student_of_a_run(teacher: Path, config: Path, images: Path, tmp_path: Path) -> None:
    """Learns what its teacher says, is evaluated and exported as any run, and is resumed."""
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    longer = ["schedule.iterations=30", "schedule.base_lr=0.05", "watch.checkpoint_every=15"]
    taken = int(latest(teacher).name)
    assert main(distill(str(teacher), config, images, whole, *longer)) == 0
    told = lines(whole)
    first, last = (np.mean([line["ibot"] for line in part]) for part in (told[:5], told[-5:]))
    assert last < first - 0.05
    assert not any(name.startswith("frozen") for name in state(whole))
    distilled = export.load_run(whole)[0]
    assert distilled.model.width == 48
    assert distilled.distill == DistillConfig(str(teacher), iteration=taken)
    assert main(distill(str(teacher), config, images, halved, *longer)) == 0
    checkpoint = halved / "checkpoints" / "00000030"
    for path in sorted(checkpoint.iterdir()):
        path.unlink()
    checkpoint.rmdir()
    assert main(["resume", str(halved)]) == 0
    assert lines(halved) == told
    assert same(state(halved), state(whole))


def test_a_student_goes_on_with_the_anchors_it_began_with(
    config: Path, images: Path, tmp_path: Path
) -> None:
    """Also where its batches are cut in another way, which would draw others."""
    weights = tmp_path / "w.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), weights)
    out = tmp_path / "run"
    command = distill("test_vit", config, images, out, "schedule.iterations=2")
    assert main([*command, "--teacher-weights", str(weights)]) == 0
    saved = anchors(out)
    more = ["--set", "schedule.iterations=4", "--set", "parallel.accumulate=2"]
    assert main(["resume", str(out), *more]) == 0
    assert latest(out).name == "00000004"
    assert same(anchors(out), saved)


def anchors(run: Path) -> dict[str, torch.Tensor]:
    """As the last checkpoint holds them."""
    config = export.read_config(run)
    made = StudentTeacher(config.model, config.objective, frozen=load_teacher(config))
    read(latest(run), made)
    assert made.frozen is not None
    return {n: v.clone() for n, v in made.frozen.state_dict().items() if "_head" in n}


def test_the_next_phase_of_a_student_is_no_distillation(
    teacher: Path, config: Path, images: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(distill(str(teacher), config, images, first, "schedule.iterations=2")) == 0
    larger = tmp_path / "larger.yaml"
    larger.write_text("crops: {global_size: 64}\nschedule: {iterations: 3, warmup: 0}\n")
    assert main([*arguments(larger, images, second), "--init", str(first)]) == 0
    assert export.load_run(second)[0].distill is None


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sharded_students_are_taught_in_low_precision(
    precision: str, config: Path, images: Path, tmp_path: Path
) -> None:
    """By a model of another patch size, whose crops are resized."""
    weights = tmp_path / "w.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), weights)
    settings = ["parallel.mode=fsdp", f"parallel.precision={precision}", "schedule.iterations=2"]
    command = distill("test_vit", config, images, tmp_path / "run", *settings)
    running = process(*command, "--teacher-weights", str(weights), ranks=2)
    assert running.wait() == 0, running.communicate()[1]
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_have_the_same_anchors_as_one(
    mode: str, config: Path, images: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "w.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), weights)
    # A centre that stays: what a batch is told depends on no other of the step.
    settings = ["objective.centering=softmax", "objective.center_momentum=1.0"]
    settings += ["schedule.iterations=1", "schedule.warmup=0", "objective.ibot_weight=0"]
    given = ["--teacher-weights", str(weights)]
    losses = []
    for name, ranks, extra in (("one", 1, "accumulate=2"), ("two", 2, f"mode={mode}")):
        command = distill(
            "test_vit", config, images, tmp_path / name, *settings, f"parallel.{extra}"
        )
        running = process(*command, *given, ranks=ranks)
        assert running.wait() == 0, running.communicate()[1]
        losses.append(lines(tmp_path / name)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (["vit_smal_patch14"], "neither the folder of a run nor a model of timm; near: vit_small"),
        (
            ["test_vit", "--teacher-weights", "none.pth"],
            "(--teacher-weights) none.pth: No such file",
        ),
        (
            ["test_vit", "--teacher-weights", __file__],
            f"(--teacher-weights) {__file__}: not weights of test_vit",
        ),
        (["."], "no run of `pretrain train`: it has no config.yaml"),
    ],
)
def test_mistakes_are_told(
    given: list[str],
    fault: str,
    config: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = distill(given[0], config, images, tmp_path / "run")
    assert fault in refused(capsys, *command, *given[1:])
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_other_prototypes_than_the_teachers_are_told(
    teacher: Path,
    config: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = "objective.dino_head.prototypes=65"
    told = refused(capsys, *distill(str(teacher), config, images, tmp_path / "run", wrong))
    assert "objective.dino_head.prototypes 65: the teacher" in told


def test_shipped_students_are_not_masked_nor_dropped() -> None:
    names = [name for name in shipped() if name.startswith("distill_")]
    assert {"distill_vits14", "distill_vitb14", "distill_vitl14", "distill_demo"} == set(names)
    for name in names:
        config = load(name, ["distill.teacher=runs/g"])
        assert config.model.drop_path == 0
        if name != "distill_demo":
            schedule = config.schedule
            assert schedule.base_lr * (schedule.batch / 1024) ** 0.5 == pytest.approx(
                1e-3, rel=1e-3
            )
