"""A batch of crops: how it is laid out, and how it becomes what the model eats.

Crops travel between processes as uint8, a quarter of the bytes, and are normalised on the device.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from pretrain.crops import GLOBAL_CROPS, CropConfig, multi_crop
from pretrain.decode import Pixels

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BadSample(NamedTuple):
    """An image that was replaced by another one, and why."""

    shard: str
    key: str
    reason: str  # its first word is a stable name
    position: int = -1  # in the run, of what it was to be; -1: outside of a run


class Batch(NamedTuple):
    """Crops of B images. Crop-major, as official: row c * B + i is crop c of image i."""

    global_crops: torch.Tensor  # (2 * B, 3, G, G) uint8: all first crops, then all second ones
    local_crops: torch.Tensor  # (L * B, 3, S, S) uint8
    keys: list[str]  # (B,)
    position: int  # of its first image in the run; the others follow
    bad: list[BadSample]


class Decoded(NamedTuple):
    """A decoded image with all that its crops depend on."""

    key: str
    pixels: Pixels  # (H, W, 3)
    rng: np.random.Generator


def collate(images: Iterable[Decoded], count: int, position: int, cfg: CropConfig) -> Batch:
    """Crops `count` images, one after the other, into one batch without bad samples."""
    side, local_side = cfg.global_size, cfg.local_size
    global_crops = np.empty((GLOBAL_CROPS, count, 3, side, side), np.uint8)
    local_crops = np.empty((cfg.local_crops, count, 3, local_side, local_side), np.uint8)
    keys = []
    for i, image in enumerate(images):
        outs = [*global_crops[:, i], *local_crops[:, i]]
        multi_crop(image.pixels, image.rng, cfg, outs)
        keys.append(image.key)
    return Batch(
        torch.from_numpy(global_crops).flatten(0, 1),
        torch.from_numpy(local_crops).flatten(0, 1),
        keys,
        position,
        [],
    )


def normalise(
    crops: torch.Tensor, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(N, 3, H, W) uint8 -> `dtype` on `device`, with ImageNet's mean and std; worked out in fp32.

    From pinned memory the copy runs beside the host.
    """
    levels = crops.to(device, non_blocking=True)
    std = torch.tensor(IMAGENET_STD, device=device).view(1, 3, 1, 1)
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(1, 3, 1, 1)
    return levels.float().mul_(1 / (255 * std)).sub_(mean / std).to(dtype)
