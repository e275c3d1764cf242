"""Weights that a run begins with, from a file of official DINOv2, timm or transformers."""

import re
from pathlib import Path
from typing import Any

import torch

from pretrain import weights
from pretrain.errors import UserError
from pretrain.student_teacher import StudentTeacher
from pretrain.vit import ViT, resize_positions

TOLD = 3  # faults of a file


def begin_with(path: Path, model: StudentTeacher) -> str:
    """Gives student and teacher the file's backbone, and its heads where it has any.

    Position embeddings of another grid are resized as the model itself does. Returns a line that
    says what was there. Errors: UserError for a file of another kind or architecture, which leaves
    the model as it was.
    """
    try:
        state = weights.read(path)
        backbone, heads = weights.to_official(state), weights.heads_of(state)
    except OSError as error:
        raise UserError(f"--init {path}: {error.strerror or error}") from None
    except Exception as error:  # whatever reads files of other kinds
        why = " ".join(str(error).split())[:200]
        raise UserError(f"--init {path}: no weights of a vision transformer: {why}") from None
    vit = model.student["backbone"]
    assert isinstance(vit, ViT)
    _check_settings(path, _settings(backbone), vit)
    there = ["backbone", *sorted({name.partition(".")[0] for name in heads})]
    told = f"--init {path}: {', '.join(there)}"
    if not heads:
        told += "; no heads: they begin at random"
    if "pos_embed" in backbone and backbone["pos_embed"].shape != vit.pos_embed.shape:
        backbone["pos_embed"] = _resized(backbone["pos_embed"], vit)
        told += f"; positions resized to {vit.config.grid} x {vit.config.grid}"
    found = {f"backbone.{name}": value for name, value in backbone.items()} | heads
    own = model.student.state_dict()
    wanted = own if heads else {n: value for n, value in own.items() if n.startswith("backbone.")}
    _check_shapes(path, found, wanted)
    for networks in (model.student, model.teacher):
        networks.load_state_dict(own | found)
    return told


def _settings(backbone: weights.State) -> dict[str, Any]:
    """What of `model` shows in the weights of a backbone."""
    found: dict[str, Any] = {"width": backbone["cls_token"].shape[-1]}
    if (patches := backbone.get("patch_embed.proj.weight")) is not None:
        found["patch_size"] = patches.shape[-1]
    found["depth"] = len({m[1] for name in backbone if (m := re.match(r"blocks\.(\d+)\.", name))})
    found["ffn"] = "swiglu" if "blocks.0.mlp.w12.weight" in backbone else "mlp"
    registers = backbone.get("register_tokens")
    found["registers"] = 0 if registers is None else registers.shape[1]
    return found


def _check_settings(path: Path, there: dict[str, Any], vit: ViT) -> None:
    here = {name: getattr(vit.config, name) for name in there}
    other = [f"model.{n} is {there[n]} there, {here[n]} here" for n in there if there[n] != here[n]]
    if other:
        raise UserError(f"--init {path}: of another architecture: {'; '.join(other)}")


def _check_shapes(path: Path, found: weights.State, wanted: weights.State) -> None:
    faults = [f"it has {name}" for name in found if name not in wanted]
    for name, value in wanted.items():
        if name not in found:
            faults.append(f"it lacks {name}")
        elif found[name].shape != value.shape:
            there, here = tuple(found[name].shape), tuple(value.shape)
            faults.append(f"{name} is {there} there, {here} here")
    if faults:
        raise UserError(f"--init {path}: of another architecture: {'; '.join(faults[:TOLD])}")


def _resized(positions: torch.Tensor, vit: ViT) -> torch.Tensor:
    """(1, 1 + M * M, D) for the grid of `vit`; anything else as it is, to be refused."""
    grid, config = positions[:, 1:], vit.config
    if positions.ndim != 3 or round(grid.shape[1] ** 0.5) ** 2 != grid.shape[1]:
        return positions
    offset, antialias = config.interpolate_offset, config.interpolate_antialias
    resized = resize_positions(grid, (config.grid, config.grid), offset, antialias)
    return torch.cat([positions[:, :1], resized], dim=1)
