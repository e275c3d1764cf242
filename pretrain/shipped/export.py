"""Weights for the curation side: fp16 safetensors that describe themselves.

The metadata key `lvd` holds JSON: name, kind ("semantic" or "copy"), arch (arguments of timm's
VisionTransformer), head, input (size, resize, interpolation, mean, std), dim, thresholds and card.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from pretrain.shipped.images import IMAGENET_MEAN, IMAGENET_STD


def semantic_description(name: str, arch: dict[str, int]) -> dict[str, Any]:
    """A semantic encoder: the feature is the class token after the final norm."""
    return {
        "name": name,
        "kind": "semantic",
        "arch": arch,
        "input": _input(arch["img_size"], "short_side_256_center_crop"),
        "dim": arch["embed_dim"],
    }


def copy_description(name: str, arch: dict[str, int], head: dict[str, Any]) -> dict[str, Any]:
    """A copy descriptor: see pretrain/shipped/copy_descriptor.py for its head."""
    return {
        "name": name,
        "kind": "copy",
        "arch": arch,
        "head": head,
        "input": _input(arch["img_size"], "squash"),
        "dim": head["dim"],
    }


def _input(size: int, resize: str) -> dict[str, Any]:
    return {
        "size": size,
        "resize": resize,
        "interpolation": "bicubic",
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }


def write_weights(
    path: Path, state: Mapping[str, torch.Tensor], description: Mapping[str, Any]
) -> None:
    """Publish the state as fp16 by a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    tensors = {key: value.detach().half().contiguous() for key, value in state.items()}
    metadata = {"lvd": json.dumps(description, sort_keys=True)}
    temporary.write_bytes(save(tensors, metadata))
    os.replace(temporary, path)


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(float32 tensors, description) of a file that `write_weights` wrote."""
    with safe_open(path, framework="pt") as file:
        description: dict[str, Any] = json.loads(file.metadata()["lvd"])
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    return tensors, description
