"""Which patches the student does not see: block-wise masks, as in BEiT and iBOT."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.ranges import Share

LEAST_PATCHES = 4  # of a block
LEAST_ASPECT = 0.3  # height / width of a block; at most its inverse
TRIES = 10  # to place one block


@dataclass(frozen=True)
class MaskingConfig:
    """DINOv2's values: half of the global crops, between a tenth and half of their patches."""

    probability: Share = 0.5
    least_ratio: Share = 0.1
    most_ratio: Share = 0.5


class Masks(NamedTuple):
    """Masks of the global crops of a batch, and where the masked patches are."""

    tokens: torch.Tensor  # (2B, N) bool
    indices: torch.Tensor  # (M,) int64: places in the flattened (2B * N)
    weights: torch.Tensor  # (M,) fp32: 1 / masked patches of the same image
    upper_bound: int  # M is never more, whatever was drawn


def draw_masks(
    images: int, grid: int, rng: np.random.Generator, config: MaskingConfig = MaskingConfig()
) -> Masks:
    """Masks for `images` = 2B crops of grid x grid patches.

    Exactly int(images * probability) of them are masked: one draws its number of patches from each
    of as many equal bins between the two ratios, and all are shuffled.
    """
    patches, masked = grid * grid, int(images * config.probability)
    edges = np.linspace(config.least_ratio, config.most_ratio, masked + 1)
    tokens = np.zeros((images, grid, grid), bool)
    for image, low, high in zip(range(masked), edges, edges[1:], strict=False):
        tokens[image] = _blocks(grid, int(patches * rng.uniform(low, high)), rng, config)
    rng.shuffle(tokens)
    flat = torch.from_numpy(tokens.reshape(images, patches))
    bound = sum(int(patches * high) for high in edges[1:])
    return _locate(flat, bound)


def hide_nothing(images: int, grid: int) -> Masks:
    """Of a distillation: the student sees every patch, and every patch counts."""
    patches = grid * grid
    tokens = torch.zeros(images, patches, dtype=torch.bool)
    count = images * patches
    return Masks(tokens, torch.arange(count), torch.full((count,), 1 / patches), count)


def _locate(tokens: torch.Tensor, upper_bound: int) -> Masks:
    """The indices and weights of (2B, N) masks."""
    count = tokens.sum(dim=1, keepdim=True).clamp(min=1)
    weights = (1 / count).expand_as(tokens)[tokens]
    return Masks(tokens, tokens.flatten().nonzero().flatten(), weights, upper_bound)


def _blocks(
    grid: int, wanted: int, rng: np.random.Generator, config: MaskingConfig
) -> NDArray[np.bool_]:
    """(grid, grid) with at most `wanted` masked patches; fewer when no further block fits."""
    mask = np.zeros((grid, grid), bool)
    largest = config.most_ratio * grid * grid
    left = wanted
    while left > 0:
        new = _place_block(mask, min(left, largest), rng)
        if not new:
            break
        left -= new
    return mask


def _place_block(mask: NDArray[np.bool_], most: float, rng: np.random.Generator) -> int:
    """Masks one more rectangle; the number of patches that were not masked before, or 0."""
    grid = len(mask)
    widest = -math.log(LEAST_ASPECT)
    for _ in range(TRIES):
        area = LEAST_PATCHES + (most - LEAST_PATCHES) * rng.random()  # `most` may be the smaller
        aspect = math.exp(rng.uniform(-widest, widest))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= grid or width >= grid:
            continue
        top, side = rng.integers(grid - height + 1), rng.integers(grid - width + 1)
        block = mask[top : top + height, side : side + width]
        new = block.size - int(block.sum())
        if 0 < new <= most:
            block[:] = True
            return new
    return 0
