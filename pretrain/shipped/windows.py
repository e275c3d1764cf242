"""Fixed random windows of images and the teacher's features of them, kept on disk."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from pretrain.shipped.images import load_rgb, to_batch

SHORT_SIDE = 256  # pixels, before the central 224: the usual evaluation view
SIZE = 224  # pixels
CHUNK = 512  # windows in one file of features


@dataclass(frozen=True)
class Windows:
    """`per_image` windows of each image; window i * per_image is image i's evaluation view.

    The others are random resized crops (area 0.3 to 1 of the image, aspect 3/4 to 4/3), half of
    them mirrored. A window is a function of (seed, its number): nothing but the images is stored.
    """

    images: list[Path]
    per_image: int
    seed: int

    def __len__(self) -> int:
        return len(self.images) * self.per_image

    def load(self, number: int) -> Image.Image:
        """The window's 224 x 224 RGB pixels."""
        image = load_rgb(self.images[number // self.per_image])
        if number % self.per_image == 0:
            return evaluation_view(image)
        rng = np.random.default_rng([self.seed, number])
        return _random_resized_crop(image, rng)

    def batch(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        """(B,) window numbers -> (B, 3, 224, 224)."""
        return to_batch([self.load(int(number)) for number in numbers])


def evaluation_view(image: Image.Image) -> Image.Image:
    """Short side to 256 (bicubic), then the central 224 x 224."""
    scale = SHORT_SIDE / min(image.size)
    left, top = ((side * scale - SIZE) / 2 / scale for side in image.size)
    side = SIZE / scale
    box = (left, top, left + side, top + side)
    return image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)


def _random_resized_crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    width, height = image.size
    area = width * height * rng.uniform(0.3, 1.0)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    crop_width = min(width, float(np.sqrt(area * aspect)))
    crop_height = min(height, float(np.sqrt(area / aspect)))
    left = rng.uniform(0, width - crop_width)
    top = rng.uniform(0, height - crop_height)
    box = (left, top, left + crop_width, top + crop_height)
    window = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    if rng.random() < 0.5:
        window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return window


def token_features(tokens: torch.Tensor) -> torch.Tensor:
    """(B, 1 + 14 * 14, D) normed tokens -> (B, 1 + 7 * 7, D): CLS, and patches averaged 2 x 2."""
    batch, _, width = tokens.shape
    grid = tokens[:, 1:].reshape(batch, 7, 2, 7, 2, width).mean(dim=(2, 4))
    return torch.cat([tokens[:, :1], grid.reshape(batch, 49, width)], dim=1)


class TeacherFeatures:
    """The teacher's token features of every window, computed once, in files of 512 windows.

    A file is published by a rename, so a killed run goes on with the first one that is missing.
    """

    def __init__(self, folder: Path, windows: Windows) -> None:
        self.folder = folder
        self.windows = windows
        self._open: dict[int, NDArray[np.float16]] = {}

    def compute(self, teacher: VisionTransformer, batch: int) -> int:
        """Write the missing files; returns how many windows were run through the teacher."""
        self.folder.mkdir(parents=True, exist_ok=True)
        done = 0
        for start in range(0, len(self.windows), CHUNK):
            path = self._path(start // CHUNK)
            if path.exists():
                continue
            numbers = np.arange(start, min(start + CHUNK, len(self.windows)))
            parts = [self._run(teacher, numbers[i : i + batch]) for i in range(0, CHUNK, batch)]
            temporary = path.with_suffix(".partial")
            with temporary.open("wb") as file:
                np.save(file, np.concatenate(parts))
            os.replace(temporary, path)
            done += len(numbers)
            print(f"teacher features: {numbers[-1] + 1}/{len(self.windows)} windows", flush=True)
        return done

    def _run(self, teacher: VisionTransformer, numbers: NDArray[np.int64]) -> NDArray[np.float16]:
        if not len(numbers):
            return np.empty((0, 50, teacher.embed_dim), np.float16)
        with torch.inference_mode():
            tokens = teacher.forward_features(self.windows.batch(numbers))
        features: NDArray[np.float16] = token_features(tokens).half().numpy()
        return features

    def batch(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        """(B,) window numbers -> (B, 50, D) float32."""
        rows = [self._file(int(n) // CHUNK)[int(n) % CHUNK] for n in numbers]
        return torch.from_numpy(np.stack(rows)).float()

    def _file(self, chunk: int) -> NDArray[np.float16]:
        if chunk not in self._open:
            self._open[chunk] = np.load(self._path(chunk), mmap_mode="r")
        return self._open[chunk]

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06d}.npy"
