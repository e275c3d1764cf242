"""The benchmark of training on a GPU, as far as a CPU can run it: FLOP, steps, the table."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_pretrain
from benchmarks.gpu_pretrain import LARGEST_ERRORS, Measured, largest_batch, recorded_losses
from benchmarks.step_flop import Size, step_flop
from pretrain import products
from pretrain.config import Config, load
from pretrain.heads import HeadConfig
from pretrain.masking import draw_masks
from pretrain.precision import Precision
from pretrain.student_teacher import Batch, ObjectiveConfig, StudentTeacher
from pretrain.vit import ViTConfig

VIT = ViTConfig(14, width=64, depth=3, heads=2, drop_path=0.4, image_size=224)
DINO, IBOT = HeadConfig(512, 96, bottleneck=64), HeadConfig(1024, 96, bottleneck=32)
CPU = torch.device("cpu")


@pytest.mark.parametrize("vit", [VIT, replace(VIT, ffn="swiglu", drop_path=0.0, registers=4)])
@pytest.mark.parametrize("objective", [ObjectiveConfig(DINO, IBOT), ObjectiveConfig(DINO)])
def test_flop_are_those_that_torch_counts(
    vit: ViTConfig, objective: ObjectiveConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of torch's products, as a GPU has them, also for attention: none of them is done twice."""
    monkeypatch.setattr(products, "_AVAILABLE", False)
    masks = draw_masks(8, 16, np.random.default_rng(0))
    model = StudentTeacher(vit, objective).train()
    crops = torch.randn(8, 3, 224, 224), torch.randn(32, 3, 98, 98)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(Batch(*crops, masks), 0.04).total.backward()
    found = step_flop(vit, objective, Size(4, len(masks.indices)))
    assert found == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("name", gpu_pretrain.LARGEST_BATCH)
def test_steps_are_those_of_the_shipped_configs(name: str) -> None:
    config = load(f"vit{name.lower()}14")
    assert gpu_pretrain.shipped(name) == config.model
    assert gpu_pretrain.OBJECTIVE == config.objective
    crops, size = Config().crops, Size(1, 0)
    assert (crops.global_size, crops.local_size, crops.local_crops) == size[2:]


@pytest.mark.parametrize("name", LARGEST_ERRORS)
def test_recorded_losses_come_out_in_each_precision(name: str) -> None:
    assert recorded_losses(Precision(name, CPU)) < LARGEST_ERRORS[name]
