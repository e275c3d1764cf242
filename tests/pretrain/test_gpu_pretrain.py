"""The benchmark of training on a GPU, as far as a CPU can run it: FLOP, steps, the table."""

import argparse
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
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_flop_are_those_that_torch_counts(
    vit: ViTConfig, objective: ObjectiveConfig, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of torch's products, as a GPU has them, also for attention: none of them is done twice."""
    monkeypatch.setattr(products, "_AVAILABLE", False)
    masks = draw_masks(8, 16, np.random.default_rng(0))
    model = StudentTeacher(vit, objective).train()
    crops = torch.randn(8, 3, 224, 224), torch.randn(32, 3, 98, 98)
    how = Precision(precision, CPU)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), how.autocast():
        model(Batch(*crops, masks), 0.04).total.backward()
    found = step_flop(vit, objective, Size(4, len(masks.indices)))
    assert found == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("name", gpu_pretrain.LARGEST_BATCH)
def test_steps_are_those_of_the_shipped_configs(name: str) -> None:
    config = load(f"vit{name.lower()}14")
    assert gpu_pretrain.shipped(name) == config.model
    assert config.objective == gpu_pretrain.OBJECTIVE
    crops, size = Config().crops, Size(1, 0)
    assert (crops.global_size, crops.local_size, crops.local_crops) == size[2:]


@pytest.mark.parametrize("name", LARGEST_ERRORS)
def test_recorded_losses_come_out_in_each_precision(name: str) -> None:
    assert recorded_losses(Precision(name, CPU)) < LARGEST_ERRORS[name]


def test_a_batch_is_halved_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(vit: ViTConfig, size: Size, *how: object) -> Measured:
        asked.append(size.images)
        if size.images > 10:
            raise torch.OutOfMemoryError
        return Measured(1, 1, 1, 1)

    monkeypatch.setattr(gpu_pretrain, "measure", measure)
    images, _ = largest_batch(32, VIT, Precision("bf16", CPU), False, 1, False)
    assert asked == [32, 16, 8]
    assert images == 8


def test_all_kinds_are_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that fails, and one that time is too short for."""
    monkeypatch.setattr(gpu_pretrain, "OBJECTIVE", ObjectiveConfig(DINO, IBOT))
    monkeypatch.setattr(gpu_pretrain, "LARGEST_BATCH", {"L": 2, "B": 2, "S": 2})
    monkeypatch.setattr(gpu_pretrain, "SIDE", 64)
    monkeypatch.setattr(gpu_pretrain, "SECONDS", {False: 0, True: 1000})
    monkeypatch.setattr(gpu_pretrain, "shipped", {"L": VIT, "B": None, "S": VIT}.get)
    kinds = ["L fp16", "B bf16", "S bf16", "S bf16 compiled"]
    options = argparse.Namespace(kinds=kinds, steps=1, seconds=600, profile=True)
    assert gpu_pretrain.run(CPU, options) == 2  # the failed one, and the MFU
    table, kernels = capsys.readouterr().out.split("MISSED: MFU of ViT-L")
    _, _, fp16, failed, bf16, late = (row for row in table.splitlines() if row.startswith("|"))
    assert fp16.startswith("| L fp16 | 2 |")
    assert failed.startswith("| B bf16 | failed: ")
    assert bf16.startswith("| S bf16 | 2 |")
    assert late == "| S bf16 compiled | left out, for time |"
    assert "aten::addmm" in kernels
