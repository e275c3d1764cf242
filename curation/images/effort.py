"""What a model asks of a machine: its FLOP an image, counted without its weights."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from curation.images.encoders import (
    DEMO_MODEL,
    ONEDNN_LINEAR,
    VectorModel,
    load_copy_descriptor,
    load_semantic,
)
from curation.images.errors import EncoderError


@dataclass(frozen=True)
class Effort:
    """FLOP of one image (a multiplication and an addition are two), bytes of the weights in fp32,
    and the length of the vectors."""

    flop: float
    weight_bytes: float
    dim: int


# ResNet-50 with a 512-d head: 4.1 GMAC and 25 M weights at 224 x 224, here at 320 x 320.
SSCD = Effort(16.8e9, 1e8, 512)


def semantic_effort(model: str) -> Effort:
    """Of `lvd_demo` or a timm model. Raises EncoderError when timm has none of that name."""
    if model == DEMO_MODEL:
        return _of(load_semantic(model, None, "fp32"))
    import timm
    from timm.data.config import resolve_model_data_config

    if not timm.is_model(model):
        raise EncoderError(f"encoder.model: timm has no model '{model}'")
    with torch.device("meta"):
        net = timm.create_model(model, num_classes=0).eval()
    config: dict[str, Any] = resolve_model_data_config(net)  # type: ignore[no-untyped-call]
    return _count(net, int(config["input_size"][1]), int(net.num_features), "meta")  # type: ignore[arg-type]


def copy_effort(weights: str) -> Effort:
    """Of the built-in copy descriptor; any other is taken for SSCD's ResNet-50."""
    return _of(load_copy_descriptor(None)) if weights == "builtin" else SSCD


def _of(model: VectorModel) -> Effort:
    return _count(model.net.float(), model.form.size, model.dim, str(model.device))


def _count(net: nn.Module, side: int, dim: int, device: str) -> Effort:
    counted = {ONEDNN_LINEAR: _linear_flop} if ONEDNN_LINEAR else {}
    counter = FlopCounterMode(display=False, custom_mapping=counted)
    with counter, torch.inference_mode():
        net(torch.zeros(1, 3, side, side, device=device))
    weights = sum(4 * parameter.numel() for parameter in net.parameters())
    return Effort(float(counter.get_total_flops()), float(weights), dim)


def _linear_flop(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
    flop: int = 2 * math.prod(rows) * weight[0]
    return flop
