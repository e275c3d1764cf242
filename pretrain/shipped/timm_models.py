"""timm vision transformers: the frozen teacher, and small students cut from its blocks."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeGuard

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

from pretrain.errors import UserError

PATCH = 16  # pixels
HEAD_WIDTH = 64  # channels of one attention head, as in every DeiT and ViT
INPUT_SIZE = 224  # pixels


def load_vit(name: str, weights: Path) -> VisionTransformer:
    """The frozen timm ViT/16 `name` without its classifier, in eval mode, fp32.

    Raises UserError for an unknown name, a model that is no ViT/16 at 224, or other weights.
    """
    if not timm.is_model(name):
        near = ", ".join(get_close_matches(name, timm.list_models("*patch16*"))) or "none"
        raise UserError(f"--teacher {name}: timm has no such model; near: {near}")
    model = timm.create_model(name, pretrained=False)
    if not _is_plain(model):
        raise UserError(f"--teacher {name}: not a plain ViT with {PATCH}-pixel patches")
    if model.patch_embed.img_size != (INPUT_SIZE, INPUT_SIZE):
        raise UserError(f"--teacher {name}: takes {model.patch_embed.img_size}, not {INPUT_SIZE}")
    if not weights.is_file():
        raise UserError(f"--teacher-weights {weights}: no such file")
    try:
        state = {key: value.float() for key, value in load_file(weights).items()}
        model.load_state_dict(state)
    except SafetensorError as error:
        raise UserError(f"--teacher-weights {weights}: not a safetensors file ({error})") from None
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise UserError(f"--teacher-weights {weights}: do not fit {name}: {first}") from None
    model.reset_classifier(0)
    return model.eval().requires_grad_(False)


def _is_plain(model: nn.Module) -> TypeGuard[VisionTransformer]:
    """One class token, which is also the feature, and patches of PATCH pixels."""
    return (
        isinstance(model, VisionTransformer)
        and model.patch_embed.patch_size == (PATCH, PATCH)
        and (model.num_prefix_tokens, model.global_pool) == (1, "token")
    )


def student_arch(width: int, depth: int, size: int = INPUT_SIZE) -> dict[str, int]:
    """Arguments of timm's VisionTransformer for a student of this width (a multiple of 64)."""
    return {
        "img_size": size,
        "patch_size": PATCH,
        "embed_dim": width,
        "depth": depth,
        "num_heads": width // HEAD_WIDTH,
        "num_classes": 0,
    }


def build_vit(arch: dict[str, Any], seed: int) -> VisionTransformer:
    """A randomly initialised ViT: the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VisionTransformer(**arch)


def same_layers(one: VisionTransformer, other: VisionTransformer) -> bool:
    """Whether a block of one could stand in the other: the width, and the layers timm gave both."""

    def shapes(vit: VisionTransformer) -> dict[str, torch.Size]:
        deeper = ("pos_embed", *(f"blocks.{block}." for block in range(1, len(vit.blocks))))
        state = vit.state_dict().items()
        return {name: value.shape for name, value in state if not name.startswith(deeper)}

    return shapes(one) == shapes(other)


@torch.inference_mode()
def needed_blocks(teacher: VisionTransformer, pixels: torch.Tensor, depth: int) -> list[int]:
    """The `depth` teacher blocks that are left when the least needed one is dropped time and again.

    Least needed: without it the class tokens of `pixels` (B, 3, 224, 224) stay nearest to the whole
    teacher's. Evenly spread blocks are a far worse start: cosine .05 for 6 of DeiT-tiny's 12, where
    8 picked ones have .59.
    """
    whole = teacher.forward_features(pixels)[:, 0]
    kept = list(range(len(teacher.blocks)))
    embedded = teacher.norm_pre(teacher._pos_embed(teacher.patch_embed(pixels)))
    while len(kept) > depth:
        before = embedded  # tokens that reach the candidate: computed once for all that follow it
        nearness = []
        for place, block in enumerate(kept):
            tokens = before
            for later in kept[place + 1 :]:
                tokens = teacher.blocks[later](tokens)
            near = functional.cosine_similarity(teacher.norm(tokens)[:, 0], whole).mean()
            nearness.append(float(near))
            before = teacher.blocks[block](before)
        del kept[nearness.index(max(nearness))]
    return kept


def copy_blocks(teacher: VisionTransformer, student: VisionTransformer, blocks: list[int]) -> None:
    """Start the student from these teacher blocks and the teacher's embedding and final norm.

    Layer selection as in DistilBERT (Sanh et al. 2019). Both have `same_layers` and input size.
    """
    state = teacher.state_dict()
    picked = {key: value for key, value in state.items() if not key.startswith("blocks.")}
    for to, source in enumerate(blocks):
        prefix = f"blocks.{source}."
        for key, value in state.items():
            if key.startswith(prefix):
                picked[f"blocks.{to}.{key.removeprefix(prefix)}"] = value
    student.load_state_dict(picked)
