"""AdamW's parameter groups: which learning rate and weight decay each parameter gets."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

EMBEDDINGS = ("cls_token", "pos_embed", "mask_token", "register_tokens", "patch_embed")


def param_groups(
    student: nn.ModuleDict, layer_decay: float, patch_embed_lr: float
) -> list[dict[str, Any]]:
    """Groups with `lr_multiplier`, `wd_multiplier` and `is_last_layer`, as few as possible.

    The learning rate falls by `layer_decay` with each block below the final norm; the patch
    embedding's is multiplied by `patch_embed_lr`. No weight decay on biases, norms and LayerScale;
    tokens and position embedding have it, as in the official code.
    """
    blocks = sum(1 for _ in student["backbone"].get_submodule("blocks").children())
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        network, _, inside = name.partition(".")
        depth = blocks if network == "backbone" else 0
        lr = layer_decay ** _layers_above(inside, depth)
        if inside.startswith("patch_embed."):
            lr *= patch_embed_lr
        undecayed = name.endswith((".bias", ".gamma")) or "norm" in name
        key = (lr, 0.0 if undecayed else 1.0, ".last_layer." in name)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": params, "lr_multiplier": lr, "wd_multiplier": wd, "is_last_layer": last}
        for (lr, wd, last), params in groups.items()
    ]


def set_rates(
    groups: Iterable[dict[str, Any]], lr: float, last_layer_lr: float, weight_decay: float
) -> None:
    """Writes one iteration's values into the groups of an optimizer."""
    for group in groups:
        group["lr"] = (last_layer_lr if group["is_last_layer"] else lr) * group["lr_multiplier"]
        group["weight_decay"] = weight_decay * group["wd_multiplier"]


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.AdamW:
    """The optimizer, in one kernel a group; `set_rates` before each step."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, weight_decay=0.0, fused=True)


def _layers_above(name: str, depth: int) -> int:
    """How many steps of layer decay a parameter of a network with `depth` blocks gets."""
    if block := re.match(r"blocks\.(\d+)\.", name):
        return depth - int(block[1])
    return depth + 1 if depth and name.startswith(EMBEDDINGS) else 0
