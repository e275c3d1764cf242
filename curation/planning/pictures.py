"""Pictures that models and stages are measured on: the user's, or made up."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from curation.recipe import RecipeError


def pictures(folder: str | None) -> list[bytes]:
    """At most 512 of the files in a folder, evenly spaced; without a folder 64 that are made up."""
    if folder is None:
        return [picture(seed, 500, 400, 90) for seed in range(64)]
    names = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    chosen = names[:: max(1, len(names) // 256)]
    if not chosen:
        raise RecipeError(f"--images {folder}: no files there")
    return [path.read_bytes() for path in chosen]


def picture(seed: int, width: int, height: int, quality: int) -> bytes:
    """A smooth JPEG with some grain."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    grain = rng.normal(0, 6, (height, width, 3))
    pixels = np.asarray(smooth.resize((width, height), Image.Resampling.BICUBIC)) + grain
    out = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=quality)
    return out.getvalue()
