"""One step as a whole: what the golden files leave open."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import scores
from pretrain.heads import HeadConfig
from pretrain.masking import MaskingConfig, draw_masks, hide_nothing
from pretrain.param_groups import adamw, param_groups, set_rates
from pretrain.scores import CHUNK_BYTES
from pretrain.student_teacher import Batch, ObjectiveConfig, StudentTeacher, clip_gradients
from pretrain.vit import ViTConfig

VIT = ViTConfig(width=32, depth=2, heads=2, image_size=84, registers=1)
HEAD = HeadConfig(prototypes=50, hidden=24, bottleneck=8)
SEPARATE = ObjectiveConfig(HEAD, HeadConfig(prototypes=30, hidden=24, bottleneck=6))
IMAGES = 4


def batch(seed: int = 0, locals_: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    crops = [
        torch.randn(views * IMAGES, 3, size, size, generator=generator)
        for views, size in ((2, 84), (locals_, 42))
    ]
    return Batch(*crops, draw_masks(2 * IMAGES, 6, np.random.default_rng(seed)))


def model(objective: ObjectiveConfig = SEPARATE, vit: ViTConfig = VIT) -> StudentTeacher:
    """The teacher is not the student: both are moved away from their start."""
    torch.manual_seed(0)
    made = StudentTeacher(vit, objective).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


def gradients(made: StudentTeacher) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in made.student.named_parameters() if p.grad is not None}


def test_the_teacher_starts_as_the_student_and_stays_in_eval_mode() -> None:
    made = StudentTeacher(VIT, SEPARATE).train()
    student, teacher = made.student.state_dict(), made.teacher.state_dict()
    assert all(torch.equal(value, teacher[name]) for name, value in student.items())
    assert made.student.training
    assert not any(module.training for module in made.teacher.modules())
    assert not any(p.requires_grad for p in made.teacher.parameters())


def test_the_teacher_moves_by_the_formula() -> None:
    made = model()
    before = {n: p.clone() for n, p in made.teacher.named_parameters()}
    made.update_teacher(0.9)
    for name, parameter in made.student.named_parameters():
        expected = 0.9 * before[name] + 0.1 * parameter
        assert torch.allclose(made.teacher.get_parameter(name), expected, atol=1e-7)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "softmax"])
def test_a_step_reaches_every_parameter_of_the_student(shared: bool, centering: str) -> None:
    objective = replace(SEPARATE, centering=centering)
    made = model(replace(objective, ibot_head=None) if shared else objective)
    losses = made(batch(), 0.04)
    losses.total.backward()
    named = dict(made.student.named_parameters())
    assert set(gradients(made)) == set(named)
    weighted = {"dino_global": 1.0, "dino_local": 1.0, "ibot": 1.0, "koleo": 0.1}
    total = sum(weight * losses.values[name] for name, weight in weighted.items())
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-5)
    assert 0 < losses.values["teacher_entropy"] < np.log(50)
    assert 1 / 8 <= losses.values["prototype_usage"] <= 1
    assert not any(value.requires_grad for value in losses.values.values())


@pytest.mark.parametrize("weights", [{"ibot_weight": 0.0}, {"dino_weight": 0.0}])
def test_a_loss_of_no_weight_has_no_value(weights: dict[str, float]) -> None:
    losses = model(replace(SEPARATE, koleo_weight=0.5, **weights))(batch(), 0.04)
    without = ("ibot",) if "ibot_weight" in weights else ("dino_global", "dino_local")
    kept = {"dino_global", "dino_local", "ibot"} - set(without)
    assert {"dino_global", "dino_local", "ibot"} & losses.values.keys() == kept
    total = sum(losses.values[name] for name in kept) + 0.5 * losses.values["koleo"]
    assert losses.total.item() == pytest.approx(float(total), rel=1e-5)


def test_no_local_crops_and_no_masks_are_no_error() -> None:
    made, empty = model(), batch(locals_=0)
    masks = draw_masks(2 * IMAGES, 6, np.random.default_rng(0), MaskingConfig(probability=0.0))
    losses = made(empty._replace(masks=masks), 0.04)
    losses.total.backward()
    assert losses.total.isfinite()
    assert losses.values["ibot"] == 0


def test_activation_checkpointing_and_drop_path_change_no_gradient() -> None:
    vit = replace(VIT, drop_path=0.4)
    found = []
    for checkpointing in (False, True):
        made = model(vit=vit)
        made.student["backbone"].activation_checkpointing = checkpointing
        torch.manual_seed(5)
        made(batch(), 0.04).total.backward()
        found.append(gradients(made))
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_comes_near_fp32(dtype: torch.dtype) -> None:
    plain, low = model(), model()
    expected = plain(batch(), 0.04)
    expected.total.backward()
    with torch.autocast("cpu", dtype):
        losses = low(batch(), 0.04)
    (1024 * losses.total).backward()
    assert losses.total.dtype == torch.float32
    assert losses.total.item() == pytest.approx(expected.total.item(), rel=0.03)
    for name, gradient in gradients(plain).items():
        if name.endswith(("mlp.0.weight", "weight_v", "proj.weight", "w12.weight")):
            error = (gradients(low)[name] / 1024 - gradient).norm() / gradient.norm()
            assert error < 0.1, name


def test_each_network_is_clipped_apart() -> None:
    made = model()
    (100 * made(batch(), 0.04).total).backward()
    before = gradients(made)
    norms = clip_gradients(made.student, 3.0)
    assert list(norms) == ["backbone", "dino_head", "ibot_head"]
    for name, norm in norms.items():
        mine = [g for n, g in before.items() if n.startswith(f"{name}.")]
        assert norm.item() == pytest.approx(torch.stack([g.norm() for g in mine]).norm().item())
        after = torch.stack([p.grad.norm() for p in made.student[name].parameters()]).norm()
        assert after.item() == pytest.approx(min(3.0, norm.item()), rel=1e-4)


def table(made: StudentTeacher, **rates: float) -> dict[str, tuple[float, float, bool]]:
    groups = param_groups(made.student, **rates)
    names = {p: name for name, p in made.student.named_parameters()}
    found = {
        names[p]: (g["lr_multiplier"], g["wd_multiplier"], g["is_last_layer"])
        for g in groups
        for p in g["params"]
    }
    assert len(found) == sum(len(g["params"]) for g in groups) == len(names)
    return found


def test_rates_by_parameter() -> None:
    found = table(model(), layer_decay=0.9, patch_embed_lr=0.2)
    expected = {
        "backbone.cls_token": (0.9**3, 1.0, False),
        "backbone.pos_embed": (0.9**3, 1.0, False),
        "backbone.mask_token": (0.9**3, 1.0, False),
        "backbone.register_tokens": (0.9**3, 1.0, False),
        "backbone.patch_embed.proj.weight": (0.9**3 * 0.2, 1.0, False),
        "backbone.patch_embed.proj.bias": (0.9**3 * 0.2, 0.0, False),
        "backbone.blocks.0.attn.qkv.weight": (0.9**2, 1.0, False),
        "backbone.blocks.1.attn.qkv.weight": (0.9, 1.0, False),
        "backbone.blocks.1.norm1.weight": (0.9, 0.0, False),
        "backbone.blocks.1.ls2.gamma": (0.9, 0.0, False),
        "backbone.norm.weight": (1.0, 0.0, False),
        "dino_head.mlp.0.weight": (1.0, 1.0, False),
        "dino_head.mlp.4.bias": (1.0, 0.0, False),
        "ibot_head.last_layer.weight_v": (1.0, 1.0, True),
        "ibot_head.last_layer.weight_g": (1.0, 1.0, True),
    }
    for name, rates in expected.items():
        assert found[name] == pytest.approx(rates), name


def test_equal_rates_share_a_group_and_a_frozen_last_layer_stays() -> None:
    made = model()
    groups = param_groups(made.student, layer_decay=1.0, patch_embed_lr=0.2)
    assert len(groups) == 5  # patch embedding and the rest, with and without decay; last layers
    optimizer = adamw(groups, (0.9, 0.999))
    set_rates(optimizer.param_groups, lr=1e-3, last_layer_lr=0.0, weight_decay=0.04)
    made(batch(), 0.04).total.backward()
    before = {n: p.clone() for n, p in made.student.named_parameters()}
    optimizer.step()
    for name, parameter in made.student.named_parameters():
        assert torch.equal(parameter, before[name]) == ("last_layer" in name), name


def test_networks_are_modules_by_the_official_names() -> None:
    assert isinstance(model().student, nn.ModuleDict)
    names = set(model().student.state_dict())
    assert {"dino_head.mlp.4.bias", "ibot_head.last_layer.weight_g", "backbone.norm.bias"} <= names


class Largest(TorchDispatchMode):
    """The largest fp32 result of any operation, forward and backward, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                self.bytes = max(self.bytes, value.numel() * 4)
        return out


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "softmax"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_scores_of_all_tokens_never_stand_whole(
    precision: torch.dtype, centering: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3,136 patches, as a distillation compares them all, with 8,192 prototypes: 98 MiB in fp32."""
    monkeypatch.setattr(scores, "KEPT_BYTES", CHUNK_BYTES)
    head = HeadConfig(prototypes=8192, hidden=16, bottleneck=8)
    objective = ObjectiveConfig(head, None if shared else head, centering)
    made = model(objective, replace(VIT, width=16, patch_size=6))
    masks = hide_nothing(2 * IMAGES, 14)
    masks = masks._replace(indices=masks.indices.repeat(2), weights=masks.weights.repeat(2))
    with torch.autocast("cpu", torch.bfloat16, precision == torch.bfloat16), Largest() as largest:
        made(batch()._replace(masks=masks), 0.04).total.backward()
    whole = 4 * 8192 * len(masks.indices)
    assert CHUNK_BYTES / 2 < largest.bytes <= CHUNK_BYTES < whole
