"""A GPU's blocks against timm's: the same numbers by other steps, wherever they run."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from curation.images.gpu_blocks import (
    AddingBlocks,
    FusedMlp,
    PatchProduct,
    multiply_patches,
    recorded,
    suit_gpu,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TANH = 5e-3 if DEVICE == "cuda" else 1e-5  # a GPU's GELU by tanh moves features so far at most


def network(name: str, **options: object) -> nn.Module:
    """With random biases and scales: timm's are zeros and ones at first."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0, **options).eval().to(DEVICE)
    for which, parameter in net.named_parameters():
        if which.endswith(("bias", "gamma")):
            nn.init.normal_(parameter, std=0.3)
    return net


def images(count: int = 2, side: int = 224) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@torch.inference_mode()
def assert_alike(ours: nn.Module, timms: nn.Module, off: float, side: int = 224) -> None:
    found, wanted = ours(images(side=side)), timms(images(side=side))
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, atol=off * scale, rtol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"init_values": 0.1, "global_pool": "avg", "qkv_bias": False}),
        ("vit_small_patch14_dinov2", {"img_size": 224}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 224}),
    ],
)
def test_a_vits_blocks_and_patches_give_timms_features(
    name: str, options: dict[str, object]
) -> None:
    timms = network(name, **options)
    ours = copy.deepcopy(timms)
    assert multiply_patches(ours) == torch.contiguous_format
    suit_gpu(ours)
    kinds = {type(module) for module in ours.modules()}
    assert {AddingBlocks, PatchProduct} <= kinds
    assert not kinds & {nn.Conv2d, timm.models.vision_transformer.Block}
    assert_alike(ours, timms, TANH)


@pytest.mark.parametrize(
    ("name", "options", "fused"),
    [
        ("vit_tiny_patch16_224", {"qk_norm": True}, True),
        ("eva02_tiny_patch14_224", {}, False),
        ("swin_tiny_patch4_window7_224", {}, True),
        ("resnet18", {}, False),
    ],
)
def test_what_is_no_plain_block_stays(name: str, options: dict[str, object], fused: bool) -> None:
    timms = network(name, **options)
    ours = copy.deepcopy(timms)
    layout = multiply_patches(ours)
    suit_gpu(ours)
    kinds = {type(module) for module in ours.modules()}
    assert AddingBlocks not in kinds
    assert (FusedMlp in kinds) == fused
    assert (layout == torch.channels_last) == (nn.Conv2d in kinds)
    assert_alike(ours, timms, TANH)


def test_half_precision_is_no_further_from_fp32_than_timms() -> None:
    exact = network("vit_small_patch16_224")
    timms = copy.deepcopy(exact).to(torch.bfloat16)
    ours = copy.deepcopy(timms)
    suit_gpu(ours)
    with torch.inference_mode():
        wanted = exact(images(8))
        off = [
            (net(images(8).bfloat16()).float() - wanted).norm() / wanted.norm()
            for net in (ours, timms)
        ]
    assert off[0] < 1.2 * off[1] < 0.02


def test_a_recorded_computation_takes_new_inputs_each_time() -> None:
    def double(x: Tensor) -> Tensor:
        return x * 2.0

    again = recorded(double, torch.zeros(3, device=DEVICE))
    for number in (1.0, 5.0):
        x = torch.full((3,), number, device=DEVICE)
        torch.testing.assert_close(again(x), 2 * x)
