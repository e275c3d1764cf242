"""Thresholds of a copy descriptor: cosines at which pairs of a real folder are right this often."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pretrain.shipped.augment import edited_copy
from pretrain.shipped.images import load_rgb

PAIR_PRECISION = 0.995  # of links inside a pool, at `min_cosine`
HOLDOUT_PRECISION = 0.96  # of links to evaluation sets, where a miss costs more than an image
SSCD_MIN_COSINE = 0.6  # DINOv2, app. A.3: the number that recipes carry
SAME_PHOTO = 0.85  # unedited images this near are one photo saved twice, so neither right nor wrong
LEAST_WRONG = 0.2  # below this lie nearly all pairs, and no threshold
COPIES = 2  # of each held-out image
BATCH = 32

Describe = Callable[[Sequence[Image.Image]], torch.Tensor]  # RGB images -> (B, D) unit norm


@dataclass(frozen=True)
class Calibration:
    """Thresholds on the scale (c + constant) / (1 + constant), and what they were read from."""

    constant: float
    min_cosine: float
    holdout_min_cosine: float
    measured: dict[str, float]


def calibrate(
    describe: Describe, images: Sequence[Path], held_out: Sequence[Path], seed: int
) -> Calibration:
    """Edited copies of `held_out`, and these, against all images: the lowest precise cosines.

    Where `min_cosine` falls below SSCD's 0.6, a constant component lifts it to exactly that.
    """
    places = {path: number for number, path in enumerate(images)}
    originals = np.array([places[path] for path in held_out])
    natural = _describe_all(describe, images)  # (N, D)
    copies = _describe_copies(describe, held_out, seed)  # (H * COPIES, D)
    right, wrong = pair_cosines(natural, originals, copies)
    exact = threshold_at(right, wrong, PAIR_PRECISION)
    eager = threshold_at(right, wrong, HOLDOUT_PRECISION)
    constant = max(0.0, (SSCD_MIN_COSINE - exact) / (1.0 - SSCD_MIN_COSINE))
    exact, eager = ((cosine + constant) / (1.0 + constant) for cosine in (exact, eager))
    lifted_right, lifted_wrong = ((c + constant) / (1.0 + constant) for c in (right, wrong))
    measured = {"held_out_images": float(len(held_out)), "images": float(len(images))}
    for name, cosine in (("min_cosine", exact), ("holdout_min_cosine", eager)):
        found, false = (lifted_right >= cosine).sum(), (lifted_wrong >= cosine).sum()
        measured[f"recall_at_{name}"] = round(float(found / len(right)), 4)
        measured[f"precision_at_{name}"] = round(float(found / max(1, found + false)), 4)
    return Calibration(round(constant, 4), round(exact, 3), round(eager, 3), measured)


def threshold_at(right: NDArray[np.float32], wrong: NDArray[np.float32], precision: float) -> float:
    """The lowest cosine at and above which right / (right + wrong) >= `precision`, else 1."""
    cosines = np.concatenate([right, wrong])
    order = np.argsort(-cosines, kind="stable")
    correct = np.arange(len(cosines)) < len(right)
    share = np.cumsum(correct[order]) / np.arange(1, len(cosines) + 1)
    enough = np.flatnonzero(share >= precision)
    return float(cosines[order[enough[-1]]]) if len(enough) else 1.0


def pair_cosines(
    natural: NDArray[np.float32], originals: NDArray[np.int64], copies: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines of right pairs (copy, its original), and of wrong ones above LEAST_WRONG: a copy or
    its original with any other image.

    natural (N, D); originals (H,) rows of natural; copies (H * COPIES, D), an original's together.
    """
    each = len(copies) // len(originals)
    to_natural = copies @ natural.T  # (H * COPIES, N)
    right = to_natural[np.arange(len(copies)), np.repeat(originals, each)]
    among = natural[originals] @ natural.T  # (H, N)
    same_photo = among >= SAME_PHOTO  # each original itself too
    to_natural[same_photo.repeat(each, axis=0)] = -1.0
    among[same_photo] = -1.0
    wrong = np.concatenate([to_natural[to_natural > LEAST_WRONG], among[among > LEAST_WRONG]])
    return right, wrong


def _describe_all(describe: Describe, images: Sequence[Path]) -> NDArray[np.float32]:
    parts = [
        describe([load_rgb(path) for path in images[start : start + BATCH]])
        for start in range(0, len(images), BATCH)
    ]
    rows: NDArray[np.float32] = torch.cat(parts).numpy()
    return rows


def _describe_copies(
    describe: Describe, held_out: Sequence[Path], seed: int
) -> NDArray[np.float32]:
    """COPIES of each; where one is pasted onto another picture, that is the next held-out image."""
    parts = []
    for number, path in enumerate(held_out):
        rng = np.random.default_rng([seed, 2, number])
        image, other = load_rgb(path), load_rgb(held_out[(number + 1) % len(held_out)])
        parts.append(describe([edited_copy(image, other, rng) for _ in range(COPIES)]))
    rows: NDArray[np.float32] = torch.cat(parts).numpy()
    return rows
