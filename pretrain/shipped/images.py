"""Folders of images -> decoded RGB images and normalised batches."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from pretrain.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def list_images(folders: Iterable[Path]) -> list[Path]:
    """Image files under `folders`, at any depth, sorted: one folder always gives one order."""
    found: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--images {folder}: no such folder")
        here = {p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()}
        if not here:
            raise UserError(f"--images {folder}: holds no image ({', '.join(sorted(SUFFIXES))})")
        found |= here
    return sorted(found)


def readable_images(folders: Iterable[Path]) -> tuple[list[Path], int]:
    """The images that decode in full, and the number that do not."""
    listed = list_images(folders)
    good = [path for path in listed if _decodes(path)]
    if not good:
        raise UserError(f"none of the {len(listed)} image files under --images can be decoded")
    return good, len(listed) - len(good)


def _decodes(path: Path) -> bool:
    try:
        load_rgb(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False  # what Pillow raises for a file that is no image, or a broken one
    return True


def load_rgb(path: Path) -> Image.Image:
    """The upright RGB image. Raises OSError, ValueError or SyntaxError when it does not decode."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def to_batch(images: Sequence[Image.Image]) -> torch.Tensor:
    """Equally sized RGB images -> (B, 3, H, W) float32, normalised with ImageNet's mean and std."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    scaled = pixels.permute(0, 3, 1, 2).float().div_(255.0)
    mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    return scaled.sub_(mean).div_(std).contiguous()
