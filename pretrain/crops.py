"""DINOv2's multi-crop: one decoded image -> two global and some local crops, all uint8.

Parameters of all crops are drawn first, as arrays and from one block of random numbers; the pixels
follow from them alone. Operations, order and probabilities are those of facebookresearch/dinov2,
`data/augmentations.py`: crop and resize, flip, colour jitter, grey, blur, solarize.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from pretrain.decode import Pixels
from pretrain.pixels import finish
from pretrain.ranges import CountOrZero

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

GLOBAL_CROPS = 2
Side = Annotated[int, Field(ge=5)]  # pixels; what a blur of 9 taps needs
RATIO = (3 / 4, 4 / 3)  # width : height
JITTER_PROBABILITY, GREY_PROBABILITY, FLIP_PROBABILITY = 0.8, 0.2, 0.5
JITTER_LOW = np.array([0.6, 0.6, 0.8, -0.1])  # brightness, contrast, saturation, hue
JITTER_HIGH = np.array([1.4, 1.4, 1.2, 0.1])
BLUR_SIGMA = (0.1, 2.0)  # pixels
SOLARIZE_PROBABILITY, SOLARIZE_THRESHOLD = 0.2, 128  # of the second global crop alone
# Of the first global crop, the second, and the local ones. Official code gives RandomApply the
# probability to keep a crop as it is; the released weights were trained so (RECIPE, item 12).
BLUR_PROBABILITY = {"paper": (1.0, 0.1, 0.5), "official": (0.0, 0.9, 0.5)}
ATTEMPTS = 10  # at a box that lies within the image, as torchvision's
NEVER = 256  # a threshold above all levels

# Columns of the block of random numbers, (crops, DRAWS).
_AREA, _ASPECT = slice(0, ATTEMPTS), slice(ATTEMPTS, 2 * ATTEMPTS)
_TOP, _LEFT, _FLIP, _JITTER, _GREY, _BLUR, _SIGMA, _SOLARIZE = range(20, 28)
_FACTORS, _ORDER = slice(28, 32), slice(32, 36)
DRAWS = 36


@dataclass(frozen=True)
class CropConfig:
    """Sides in pixels; scales are shares of the image's area."""

    global_size: Side = 224
    local_size: Side = 98
    local_crops: CountOrZero = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    blur: Literal["paper", "official"] = "paper"


@dataclass(frozen=True)
class Plan:
    """What will be done to each crop; row 0 and 1 are the global ones."""

    boxes: Ints  # (crops, 4) top, left, height, width
    flip: NDArray[np.bool_]  # (crops,)
    jitter: NDArray[np.bool_]
    operations: Ints  # (crops, 4) jitter operations in their order
    factors: Floats  # (crops, 4) by operation
    grey: NDArray[np.bool_]
    sigma: Floats  # (crops,) pixels; 0: no blur
    threshold: Ints  # (crops,) NEVER: not solarized


def multi_crop(
    image: Pixels, rng: np.random.Generator, cfg: CropConfig, outs: Sequence[Pixels]
) -> None:
    """(H, W, 3) uint8 RGB -> `outs`, one (3, S, S) array a crop, the two global ones first.

    `rng` alone decides what the crops show; their sides are those of `outs`.
    """
    plan = draw_plan(rng, image.shape[0], image.shape[1], cfg)
    for number, (out, box) in enumerate(zip(outs, plan.boxes.tolist(), strict=True)):
        top, left, height, width = box
        finish(
            resize(image[top : top + height, left : left + width], out.shape[1], out.shape[2]),
            bool(plan.flip[number]),
            plan.operations[number, : 4 * int(plan.jitter[number])],
            plan.factors[number],
            bool(plan.grey[number]),
            float(plan.sigma[number]),
            int(plan.threshold[number]),
            out,
        )


def resize(image: Pixels, height: int, width: int) -> Pixels:
    """(h, w, 3) -> (3, height, width), bicubic with antialiasing, as Pillow's within rounding.

    Torch's uint8 kernel takes less than half of Pillow's time (benchmarks/crops.py).
    """
    tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    size = (height, width)
    resized = torch.nn.functional.interpolate(tensor, size, mode="bicubic", antialias=True)
    pixels: Pixels = resized[0].contiguous().numpy()
    return pixels


def draw_plan(rng: np.random.Generator, height: int, width: int, cfg: CropConfig) -> Plan:
    """Draws what to do with the crops of an image of `height` x `width` pixels."""
    crops = GLOBAL_CROPS + cfg.local_crops
    drawn = rng.random((crops, DRAWS))
    scales = np.array([cfg.global_scale] * GLOBAL_CROPS + [cfg.local_scale] * cfg.local_crops)
    first, second, local = BLUR_PROBABILITY[cfg.blur]
    blurred = drawn[:, _BLUR] < np.array([first, second] + [local] * cfg.local_crops)
    sigma = BLUR_SIGMA[0] + drawn[:, _SIGMA] * (BLUR_SIGMA[1] - BLUR_SIGMA[0])
    threshold = np.full(crops, NEVER)
    if drawn[1, _SOLARIZE] < SOLARIZE_PROBABILITY:
        threshold[1] = SOLARIZE_THRESHOLD
    return Plan(
        boxes=draw_boxes(drawn[:, :_FLIP], height, width, scales),
        flip=drawn[:, _FLIP] < FLIP_PROBABILITY,
        jitter=drawn[:, _JITTER] < JITTER_PROBABILITY,
        operations=np.argsort(drawn[:, _ORDER], axis=1),
        factors=JITTER_LOW + drawn[:, _FACTORS] * (JITTER_HIGH - JITTER_LOW),
        grey=drawn[:, _GREY] < GREY_PROBABILITY,
        sigma=np.where(blurred, sigma, 0.0),
        threshold=threshold,
    )


def draw_boxes(drawn: Floats, height: int, width: int, scales: Floats) -> Ints:
    """(crops, 22) random numbers -> (crops, 4) top, left, height, width of random resized crops.

    Area uniform in `scales` (crops, 2), aspect log-uniform in RATIO, as torchvision's
    RandomResizedCrop: the first of ten attempts that fits, else the largest central box.
    """
    low, high = scales[:, :1], scales[:, 1:]
    area = height * width * (low + drawn[:, _AREA] * (high - low))
    least, most = math.log(RATIO[0]), math.log(RATIO[1])
    aspect = np.exp(least + drawn[:, _ASPECT] * (most - least))
    wide = np.rint(np.sqrt(area * aspect))
    tall = np.rint(np.sqrt(area / aspect))
    fits = (wide >= 1) & (tall >= 1) & (wide <= width) & (tall <= height)
    rows, chosen = np.arange(len(drawn)), fits.argmax(axis=1)
    wide, tall = wide[rows, chosen], tall[rows, chosen]
    top = np.floor(drawn[:, _TOP] * (height - tall + 1))
    left = np.floor(drawn[:, _LEFT] * (width - wide + 1))
    boxes = np.stack([top, left, tall, wide], axis=1).astype(np.int64)
    boxes[~fits.any(axis=1)] = _central_box(height, width)
    return boxes


def _central_box(height: int, width: int) -> tuple[int, int, int, int]:
    wide = min(width, round(height * RATIO[1]))
    tall = min(height, round(width / RATIO[0]))
    return (height - tall) // 2, (width - wide) // 2, tall, wide
