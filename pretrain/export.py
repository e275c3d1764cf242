"""The EMA teacher's backbone for other libraries: safetensors that timm, the official code and
transformers load."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pretrain import checkpoint, weights
from pretrain.collate import IMAGENET_MEAN, IMAGENET_STD
from pretrain.config import Config, parse
from pretrain.errors import UserError
from pretrain.student_teacher import StudentTeacher
from pretrain.vit import VIT_SIZES, ViT, ViTConfig

Format = Literal["timm", "dinov2", "transformers"]


def load_run(run: Path, iteration: int | None = None) -> tuple[Config, StudentTeacher, int]:
    """(config, model, iterations) of a run's last checkpoint, or of another one, on the CPU.

    Errors: UserError.
    """
    path = checkpoint.latest(run, iteration)
    config = read_config(run)
    model = StudentTeacher(config.model, config.objective)
    progress = checkpoint.read(path, model)
    return config, model.eval(), progress.iteration


def read_config(run: Path) -> Config:
    """The config that a run was made with."""
    import yaml

    try:
        return parse(yaml.safe_load((run / checkpoint.CONFIG).read_text()), str(run))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{run / checkpoint.CONFIG}: can't be read: {why}") from None


def export(run: Path, kind: Format, out: Path) -> Path:
    """Writes `out`/model.safetensors, and config.json where the library reads one.

    timm: `timm.create_model("local-dir:OUT", pretrained=True)`. transformers:
    `AutoModel.from_pretrained(OUT)`. Both interpolate position embeddings in ways of their own, so
    theirs has the grid of the global crops that the run was trained with: outputs are equal at that
    size, and differ by some per cent at others. dinov2: `load_state_dict` of the official
    `DinoVisionTransformer`, which interpolates as we do: the model's own grid, equal at all sizes.
    Errors: UserError.
    """
    config, model, iterations = load_run(run)
    backbone = model.teacher["backbone"]
    assert isinstance(backbone, ViT)
    state = {name: value.detach() for name, value in backbone.state_dict().items()}
    description: dict[str, Any] = {}
    if kind != "dinov2":
        seen = replace(config.model, image_size=config.crops.global_size)
        state["pos_embed"] = backbone.positions(seen.grid, seen.grid).detach()
        if kind == "timm":
            state, description = weights.to_timm(state), _timm(seen)
        else:
            state, description = weights.to_transformers(state), _transformers(seen)
    try:
        _write(out, state, iterations, description)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--out {out}: can't be written: {why}") from None
    return out / "model.safetensors"


def _write(out: Path, state: weights.State, iterations: int, description: dict[str, Any]) -> None:
    """The weights appear complete or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    facts = {"format": "pt", "lvd_iterations": str(iterations)}
    partial = out / "model.safetensors.partial"
    save_file({name: value.contiguous().clone() for name, value in state.items()}, partial, facts)
    if description:
        (out / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    os.replace(partial, out / "model.safetensors")


def _timm(model: ViTConfig) -> dict[str, Any]:
    """A model of timm's and the arguments that make it this one, as timm keeps them beside weights.

    SwiGLU is a class, which JSON can't name: it comes with the giant model.
    """
    shape = {"width": model.width, "depth": model.depth, "heads": model.heads}
    sizes = [
        name
        for name, size in VIT_SIZES.items()
        if {"ffn": "mlp", **size} == {**shape, "ffn": model.ffn}
    ]
    name = "giant" if model.ffn == "swiglu" else next(iter(sizes), "small")
    architecture = f"vit_{name}_patch14{'_reg4' if model.registers else ''}_dinov2"
    arguments: dict[str, Any] = {
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.heads,
        "init_values": model.layerscale,
        "reg_tokens": model.registers,
        "no_embed_class": model.registers > 0,
        "dynamic_img_size": True,
        "mlp_ratio": _swiglu_ratio(model) if model.ffn == "swiglu" else model.ffn_ratio,
    }
    pretrained = {
        "input_size": [3, model.image_size, model.image_size],
        "interpolation": "bicubic",
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "num_classes": 0,
    }
    return {"architecture": architecture, "model_args": arguments, "pretrained_cfg": pretrained}


def _swiglu_ratio(model: ViTConfig) -> float:
    hidden = -(-int(model.width * model.ffn_ratio * 2 / 3) // 8) * 8
    return 2 * hidden / model.width


def _transformers(model: ViTConfig) -> dict[str, Any]:
    """Dinov2Config, or Dinov2WithRegistersConfig. Errors: UserError for what they can't say."""
    if model.ffn_ratio % 1:
        raise UserError(
            f"--format transformers: model.ffn_ratio {model.ffn_ratio}: it knows whole numbers only"
        )
    registers = {"num_register_tokens": model.registers} if model.registers else {}
    kind = "Dinov2WithRegisters" if model.registers else "Dinov2"
    return {
        "architectures": [f"{kind}Model"],
        "model_type": "dinov2_with_registers" if model.registers else "dinov2",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "mlp_ratio": int(model.ffn_ratio),
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "layerscale_value": model.layerscale,
        "use_swiglu_ffn": model.ffn == "swiglu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "torch_dtype": str(torch.float32).removeprefix("torch."),
        **registers,
    }
