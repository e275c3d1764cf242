"""Multi-crop on one core: ours against the pipeline that people use, and each choice apart.

    python -m benchmarks.crops [--images FOLDER] [--count 200] [--runs 5]

Processor seconds of one thread, medians of runs that take turns. The baseline is the official
augmentation (Pillow decoding, torchvision v2 on Pillow images); the second one is the same on uint8
tensors. Without a folder, generated 500 x 375 pictures stand in for photographs.
"""

import argparse
import io
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision
import torchvision.transforms.v2 as tv
from PIL import Image

from benchmarks.measuring import machine, table, target
from pretrain.collate import Decoded, collate
from pretrain.crops import CropConfig, resize
from pretrain.decode import decode
from pretrain.order import augmentation_rng
from pretrain.pixels import BRIGHTNESS, CONTRAST, HUE, SATURATION, finish

SIZE = (500, 375)  # pixels, about ImageNet's mean
LEAST_RATIO = 5.0  # images a second: ours to the baseline
CFG = CropConfig()
Work = Callable[[], Any]


def pictures(folder: Path | None, count: int) -> list[bytes]:
    """JPEG files of SIZE: photographs brought to it, or generated textures."""
    found = sorted(p for p in folder.rglob("*.jpg")) if folder else []
    chosen = random.Random(0).sample(found, min(count, len(found)))
    encoded = []
    for number in range(count):
        if chosen:
            image = Image.open(chosen[number % len(chosen)]).convert("RGB")
        else:
            noise = np.random.default_rng(number).integers(0, 256, (96, 128, 3), np.uint8)
            image = Image.fromarray(noise)
        buffer = io.BytesIO()
        image.resize(SIZE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


def official(tensors: bool) -> Callable[[bytes], list[torch.Tensor]]:
    """DINOv2's augmentation from torchvision's parts, up to uint8 crops; blur as in the paper."""
    jitter = [tv.RandomApply([tv.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), tv.RandomGrayscale(0.2)]

    def crop(size: int, scale: tuple[float, float], *extra: Any) -> tv.Compose:
        bicubic = tv.InterpolationMode.BICUBIC
        cut = tv.RandomResizedCrop(size, scale, interpolation=bicubic, antialias=True)
        last = [] if tensors else [tv.PILToTensor()]
        return tv.Compose([cut, tv.RandomHorizontalFlip(), *jitter, *extra, *last])

    blur = tv.GaussianBlur(9, (0.1, 2.0))
    sometimes = tv.RandomApply([blur], p=0.1)
    first = crop(CFG.global_size, CFG.global_scale, blur)
    second = crop(CFG.global_size, CFG.global_scale, sometimes, tv.RandomSolarize(128, p=0.2))
    local = crop(CFG.local_size, CFG.local_scale, tv.RandomApply([blur], p=0.5))

    def crops(data: bytes) -> list[torch.Tensor]:
        image: Any = Image.open(io.BytesIO(data)).convert("RGB")
        if tensors:
            image = tv.functional.pil_to_tensor(image)
        return [step(image) for step in (first, second, *[local] * CFG.local_crops)]

    return crops


def batch_of_ours(encoded: Sequence[bytes]) -> None:
    rows = (Decoded("", decode(d), augmentation_rng(0, i)) for i, d in enumerate(encoded))
    collate(rows, len(encoded), 0, CFG)


def batch_of_theirs(crops: Callable[[bytes], list[torch.Tensor]], encoded: Sequence[bytes]) -> None:
    images = [crops(data) for data in encoded]
    for rows in (slice(0, 2), slice(2, None)):
        torch.stack([crop for image in images for crop in image[rows]])


def cpu_ms(works: Sequence[Work], runs: int, repeat: int) -> list[float]:
    """Median processor milliseconds of each piece of work, done `repeat` times in each run."""
    taken: list[list[float]] = [[] for _ in works]
    for work in works:
        work()  # compiled, and its files in the cache
    for _ in range(runs):
        for work, times in zip(works, taken, strict=True):
            began = time.process_time()
            for _ in range(repeat):
                work()
            times.append((time.process_time() - began) / repeat * 1e3)
    return [median(times) for times in taken]


def whole(encoded: list[bytes], runs: int) -> int:
    batch = encoded[:64]
    names = ["torchvision v2, Pillow (official)", "torchvision v2, uint8 tensors", "ours"]
    works: list[Work] = [
        lambda: batch_of_theirs(official(tensors=False), batch),
        lambda: batch_of_theirs(official(tensors=True), batch),
        lambda: batch_of_ours(batch),
    ]
    each = [ms / len(batch) for ms in cpu_ms(works, runs, 1)]
    rows = [
        [name, f"{ms:.2f}", f"{1e3 / ms:.0f}", f"{each[0] / ms:.1f}"]
        for name, ms in zip(names, each, strict=True)
    ]
    table(["JPEG to 2 x 224 + 8 x 98", "ms an image", "images/s a core", "ratio"], rows)
    ratio = each[0] / each[2]
    return target(f"multi-crop: {LEAST_RATIO:g} times the baseline", ratio >= LEAST_RATIO)


def parts(encoded: list[bytes], runs: int) -> None:
    """What the choices are worth, one by one."""
    data = encoded[0]
    image = Image.open(io.BytesIO(data)).convert("RGB")
    pixels = np.array(image)
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    rgb = torchvision.io.ImageReadMode.RGB
    bicubic = Image.Resampling.BICUBIC
    rows: list[tuple[str, Work, Work]] = [
        (
            "decode: Pillow, torchvision.io",
            lambda: np.array(Image.open(io.BytesIO(data)).convert("RGB")),
            lambda: torchvision.io.decode_jpeg(raw, mode=rgb),
        )
    ]
    for box, side in (((20, 10, 470, 360), 224), ((100, 100, 240, 220), 98)):
        left, top, right, bottom = box
        rows.append(
            (
                f"resize {right - left} x {bottom - top} to {side}: Pillow, torch uint8",
                lambda box=box, side=side: image.crop(box).resize((side, side), bicubic),  # type: ignore[misc]
                lambda box=box, side=side: resize(  # type: ignore[misc]
                    pixels[box[1] : box[3], box[0] : box[2]], side, side
                ),
            )
        )
    small = image.resize((224, 224))
    crop = np.ascontiguousarray(np.array(small).transpose(2, 0, 1))
    rows += operations(small, crop)
    measured = []
    for name, theirs, ours in rows:
        first, second = cpu_ms([theirs, ours], runs, 20)
        measured.append([name, f"{first:.3f}", f"{second:.3f}", f"{first / second:.1f}"])
    table(["step", "first, ms", "second, ms", "ratio"], measured)


def operations(small: Image.Image, crop: Any) -> list[tuple[str, Work, Work]]:
    """torchvision on a Pillow crop of 224, and compiled with unpacking and packing."""
    F = tv.functional
    out = np.empty_like(crop)
    factors = np.array([1.2, 0.8, 1.1, 0.05])
    nothing = np.empty(0, np.int64)

    def ours(order: Any = nothing, sigma: float = 0.0, threshold: int = 256) -> Work:
        return lambda: finish(crop, False, order, factors, False, sigma, threshold, out)

    return [
        ("brightness", lambda: F.adjust_brightness(small, 1.2), ours(np.array([BRIGHTNESS]))),
        ("contrast", lambda: F.adjust_contrast(small, 0.8), ours(np.array([CONTRAST]))),
        ("saturation", lambda: F.adjust_saturation(small, 1.1), ours(np.array([SATURATION]))),
        ("hue", lambda: F.adjust_hue(small, 0.05), ours(np.array([HUE]))),
        ("blur", lambda: F.gaussian_blur(small, [9, 9], [1.0, 1.0]), ours(sigma=1.0)),
        ("solarize", lambda: F.solarize(small, 128), ours(threshold=128)),
    ]


def main(arguments: list[str] | None = None) -> int:
    """The number of targets missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crops", description=__doc__)
    parser.add_argument("--images", type=Path, help="folder of JPEG photographs")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    print(machine(), end="\n\n")
    encoded = pictures(given.images, given.count)
    missed = whole(encoded, given.runs)
    parts(encoded, given.runs)
    return missed


if __name__ == "__main__":
    sys.exit(main())
