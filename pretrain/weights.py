"""Backbone weights of others, by name: official DINOv2, timm and transformers -> ours, and back.

Our names are the official ones: `blocks.0.attn.qkv.weight`, `blocks.0.ls1.gamma`, `mask_token`,
`register_tokens`, `mlp.fc1` or, gated, `mlp.w12`. All functions take and give flat dicts of
tensors and copy no more than they must; resizing the position embedding is left to the caller
(`vit.resize_positions`).
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

State = dict[str, torch.Tensor]
HEADS = ("dino_head.", "ibot_head.")  # in a training checkpoint

# (transformers, official); attention's query, key and value are one matrix here.
_TRANSFORMERS = (
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.", ""),
    ("encoder.layer.", "blocks."),
    (".attention.output.dense.", ".attn.proj."),
    (".layer_scale1.lambda1", ".ls1.gamma"),
    (".layer_scale2.lambda1", ".ls2.gamma"),
    (".mlp.weights_in.", ".mlp.w12."),
    (".mlp.weights_out.", ".mlp.w3."),
    ("layernorm.", "norm."),
)
_QKV = ("query", "key", "value")


def read(path: Path) -> State:
    """A safetensors file, or a torch file that may hold the state among others, in fp32.

    Raises OSError, and what those libraries raise for a file of another kind.
    """
    if path.suffix == ".safetensors":
        return {name: value.float() for name, value in load_file(path).items()}
    found = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("model", "state_dict", "teacher"):
        if isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    return {name: value.float() for name, value in found.items()}


def to_official(state: Mapping[str, torch.Tensor]) -> State:
    """The backbone of any of the three sources, told apart by its names, in the official ones.

    Heads and classifiers are left out. Raises ValueError where the names are of none of them.
    """
    if any(name.endswith("embeddings.cls_token") for name in state):
        return from_transformers(state)
    state = backbone_of(state)
    if "cls_token" not in state:
        raise ValueError("neither official, timm nor transformers names: no cls_token")
    if "mask_token" in state:
        return state
    return from_timm(state)


def from_timm(state: Mapping[str, torch.Tensor]) -> State:
    """timm's names; it has no mask token (zeros) and adds the class token's position to it.

    Models without LayerScale are those whose factors are 1.
    """
    out: State = {}
    for name, value in backbone_of(state).items():
        if ".mlp.fc1_x." in name:
            continue  # the other half of fc1_g
        if ".mlp.fc1_g." in name:
            other = state[name.replace(".fc1_g.", ".fc1_x.")]
            out[name.replace(".fc1_g.", ".w12.")] = torch.cat([value, other])
        else:
            out[name] = value
    if _timm_is_gated(out):
        out = {
            n.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3."): out[n] for n in out
        }
    if "reg_token" in out:
        out["register_tokens"] = out.pop("reg_token")
        cls_position = torch.zeros_like(out["cls_token"])
        out["pos_embed"] = torch.cat([cls_position, out["pos_embed"]], dim=1)
    out["mask_token"] = torch.zeros_like(out["cls_token"][0])
    for name in [name for name in out if re.fullmatch(r"blocks\.\d+\.norm[12]\.weight", name)]:
        factors = re.sub(r"norm([12])\.weight", r"ls\1.gamma", name)
        out.setdefault(factors, torch.ones_like(out[name]))
    return out


def to_timm(state: Mapping[str, torch.Tensor]) -> State:
    """For timm's `vit_*_patch14_dinov2` and `vit_*_patch14_reg4_dinov2`; no mask token there."""
    out = {
        n.replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2."): state[n] for n in state
    }
    del out["mask_token"]
    if "register_tokens" in out:
        out["reg_token"] = out.pop("register_tokens")
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


def from_transformers(state: Mapping[str, torch.Tensor]) -> State:
    """`Dinov2Model` or `Dinov2WithRegistersModel`, or a model that holds one as `dinov2*`."""
    inner = {re.sub(r"^dinov2(_with_registers)?\.", "", name): v for name, v in state.items()}
    out: State = {}
    for name, value in inner.items():
        if not name.startswith(("embeddings.", "encoder.", "layernorm.")):
            continue  # a classifier
        if found := re.fullmatch(r"(.*)\.attention\.attention\.query\.(\w+)", name):
            parts = [inner[f"{found[1]}.attention.attention.{part}.{found[2]}"] for part in _QKV]
            name, value = f"{found[1]}.attn.qkv.{found[2]}", torch.cat(parts)
        elif ".attention.attention." in name:
            continue
        for theirs, ours in _TRANSFORMERS:
            name = name.replace(theirs, ours)
        out[name] = value
    return out


def to_transformers(state: Mapping[str, torch.Tensor]) -> State:
    """Names of `Dinov2Model`, or of `Dinov2WithRegistersModel` where there are registers."""
    out: State = {}
    for name, value in state.items():
        if name.endswith("_token") or name == "register_tokens":
            out[f"embeddings.{name}"] = value
            continue
        for theirs, ours in _TRANSFORMERS:
            if ours:
                name = re.sub(f"(^|(?<=[0-9])){re.escape(ours)}", theirs, name)
        if ".attn.qkv." in name:
            for part, rows in zip(_QKV, value.chunk(3), strict=True):
                out[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = rows
        else:
            out[name] = value
    return out


def backbone_of(state: Mapping[str, torch.Tensor]) -> State:
    """Without prefixes, heads and the chunks of blocks that FSDP checkpoints were named by."""
    inner = _of_one_network(state)
    if any(name.startswith("backbone.") for name in inner):
        inner = {
            n.removeprefix("backbone."): v for n, v in inner.items() if n.startswith("backbone.")
        }
    kept = {n: v for n, v in inner.items() if not n.startswith(("head.", "fc_norm."))}
    return {re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", name): v for name, v in kept.items()}


def heads_of(state: Mapping[str, torch.Tensor]) -> State:
    """`dino_head.*` and maybe `ibot_head.*` of a training checkpoint; nothing of other files."""
    return {n: v for n, v in _of_one_network(state).items() if n.startswith(HEADS)}


def _of_one_network(state: Mapping[str, torch.Tensor]) -> State:
    """Without prefixes; of a teacher and its student the teacher."""
    names = list(state)
    if any(re.match(r"(module\.)*teacher\.", name) for name in names):
        names = [name for name in names if not re.match(r"(module\.)*student\.", name)]
    return {re.sub(r"^(module\.|teacher\.|student\.)*", "", name): state[name] for name in names}


def _timm_is_gated(state: Mapping[str, torch.Tensor]) -> bool:
    """timm says fc1 and fc2 in both cases; a gated fc1 gives twice what fc2 takes."""
    first, second = state.get("blocks.0.mlp.fc1.weight"), state.get("blocks.0.mlp.fc2.weight")
    return first is not None and second is not None and len(first) == 2 * second.shape[1]
