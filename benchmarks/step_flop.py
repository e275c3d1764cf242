"""FLOP of the products of one training step, by formula: what MFU is a share of."""

from itertools import pairwise
from typing import NamedTuple

from pretrain.heads import HeadConfig
from pretrain.layers import Groups
from pretrain.student_teacher import ObjectiveConfig
from pretrain.vit import ViTConfig


class Size(NamedTuple):
    """What a step works on, beside the networks. Defaults: crops of the shipped configs."""

    images: int
    masked: int  # patches
    global_size: int = 224
    local_size: int = 98
    local_crops: int = 8


def step_flop(vit: ViTConfig, objective: ObjectiveConfig, size: Size) -> float:
    """FLOP of the products of a step: 2 n for n multiplications and additions.

    The teacher's forward pass on global crops, the student's on all, and twice the student's for
    its backward pass, but once for the patch embedding, whose input wants no gradient. Sequences
    that stochastic depth leaves out of a branch do not count in it, nor what a last block leaves
    out. Each head sees its rows once: DINO's class tokens, iBOT's masked patches. Nothing but
    products counts, and none counts again for being done again.
    """
    of_globals = _group(2 * size.images, size.global_size, vit)
    of_locals = _group(size.local_crops * size.images, size.local_size, vit)
    groups, ends = (of_globals, of_locals), 2 * size.images + size.masked
    if vit.drop_path > 0:
        kept = tuple((max(int(count * (1 - vit.drop_path)), 1), length) for count, length in groups)
        student = vit.depth * _block_flop(vit, kept)
    else:
        student = (vit.depth - 1) * _block_flop(vit, groups)
        student += _block_flop(vit, groups, ends + of_locals[0])
    teacher = (vit.depth - 1) * _block_flop(vit, (of_globals,))
    teacher += _block_flop(vit, (of_globals,), ends)
    dino = _head_flop(vit.width, objective.dino_head)
    ibot = size.masked * _head_flop(vit.width, objective.ibot_head or objective.dino_head)
    student += ibot + (2 * size.images + of_locals[0]) * dino
    teacher += ibot + 2 * size.images * dino
    return teacher + _embed_flop(vit, (of_globals,)) + 3 * student + 2 * _embed_flop(vit, groups)


def _group(sequences: int, side: int, vit: ViTConfig) -> tuple[int, int]:
    return sequences, 1 + vit.registers + (side // vit.patch_size) ** 2


def _embed_flop(vit: ViTConfig, groups: Groups) -> float:
    patches = sum(count * (length - 1 - vit.registers) for count, length in groups)
    return 2.0 * patches * 3 * vit.patch_size**2 * vit.width


def _block_flop(vit: ViTConfig, groups: Groups, ends: int | None = None) -> float:
    """Of one block's forward pass; what follows attention on `ends` tokens, by default on all."""
    tokens = sum(count * length for count, length in groups)
    ends = tokens if ends is None else ends
    hidden = int(vit.width * vit.ffn_ratio)
    # SwiGLU: three matrices of two thirds of the hidden width, up to a multiple of 8.
    ffn = 3 * (-(-int(hidden * 2 / 3) // 8) * 8) if vit.ffn == "swiglu" else 2 * hidden
    attention = sum(4 * count * length**2 * vit.width for count, length in groups)
    return 2.0 * vit.width * (3 * vit.width * tokens + (vit.width + ffn) * ends) + attention


def _head_flop(width: int, head: HeadConfig) -> float:
    """Of one row."""
    sizes = [width, *[head.hidden] * (head.layers - 1), head.bottleneck, head.prototypes]
    return 2.0 * sum(before * after for before, after in pairwise(sizes))
