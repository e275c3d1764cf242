"""`pretrain copy-descriptor`: a small descriptor that finds edited copies, by the SSCD recipe.

Pizzi et al. 2022: InfoNCE over strongly edited copies plus an entropy term that spreads the
descriptors. Tensors of the file: `backbone.*` (timm VisionTransformer), `head.weight` (256, 384),
`head.bias` (256,), `brightness.frequencies` (256, 63), `brightness.phases` (256,). Descriptor =
unit norm of head(concat(CLS, GeM of the patch tokens)), both after the final norm, times the root
of 1 - w, and the brightness pattern (see brightness.py) times the root of w; w is the description's
head.brightness. Then, where its head.constant is a > 0, one constant component makes a cosine c
read (c + a) / (1 + a).
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

from pretrain.errors import UserError
from pretrain.shipped.augment import edited_copy, light_copy
from pretrain.shipped.brightness import PATTERNS, SHARE, BrightnessPattern
from pretrain.shipped.calibrate import Calibration, calibrate
from pretrain.shipped.checkpoint import (
    checkpoint_path,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
)
from pretrain.shipped.entropy import entropy_loss
from pretrain.shipped.export import copy_description, write_weights
from pretrain.shipped.images import load_rgb, readable_images, to_batch
from pretrain.shipped.infonce import info_nce
from pretrain.shipped.schedules import warmup_cosine
from pretrain.shipped.timm_models import (
    PATCH,
    build_vit,
    copy_blocks,
    load_vit,
    same_layers,
    student_arch,
)

GEM_POWER = 3.0
TEMPERATURE = 0.05  # SSCD, section 4
WHITENING_FLOOR = 0.1  # of the largest standard deviation
WHITENING_IMAGES = 2048


@dataclass(frozen=True)
class CopyConfig:
    """What decides the descriptor's weights, byte for byte on one thread."""

    teacher: str
    teacher_weights: Path
    images: tuple[Path, ...]
    out: Path
    depth: int = 8
    trained_blocks: int = 3  # the last ones; those below stay the teacher's
    size: int = 160  # pixels, both sides
    dim: int = 256  # of the learned part
    steps: int = 3000
    batch: int = 48  # images; each gives two views
    lr: float = 2e-4
    weight_decay: float = 0.02
    entropy_weight: float = 15.0
    memory: int = 3072  # views
    holdout: float = 0.11  # share of the images that calibrate the thresholds, never trained on
    seed: int = 0
    checkpoint_every: int = 25  # steps


def copy_descriptor(config: CopyConfig) -> None:
    """Train (or go on after a kill), calibrate on held-out images and write the fp16 weights."""
    if config.size % PATCH or config.size < 2 * PATCH:
        raise UserError(
            f"--size {config.size}: must be a multiple of {PATCH}, at least {2 * PATCH}"
        )
    started = time.monotonic()
    model = initial_model(config)
    images, unreadable = readable_images(config.images)
    training, held_out = split_holdout(images, config.holdout)
    if len(training) < config.batch or not held_out:
        raise UserError(f"--images: {len(images)} images are too few for --batch {config.batch}")
    print(
        f"{len(training)} images to train on, {len(held_out)} held out, {unreadable} unreadable",
        flush=True,
    )
    key = fingerprint({**asdict(config), "files": [str(path) for path in images]})
    train(config, key, model, training)
    whiten_end(model, training)

    def describe(batch: Sequence[Image.Image]) -> torch.Tensor:
        with torch.inference_mode():
            rows: torch.Tensor = model(to_batch([squash(image, config.size) for image in batch]))
        return rows

    found = calibrate(describe, images, held_out, config.seed)
    description = _description(config, model.backbone.embed_dim, found)
    description["card"]["images"] = len(training)
    write_weights(config.out, model.state_dict(), description)
    checkpoint_path(config.out).unlink(missing_ok=True)
    print(f"wrote {config.out} ({time.monotonic() - started:.0f} s in this run)", flush=True)


def _description(config: CopyConfig, width: int, found: Calibration) -> dict[str, Any]:
    dim = config.dim + PATTERNS + (1 if found.constant else 0)
    head = {"gem_p": GEM_POWER, "dim": dim, "brightness": SHARE, "constant": found.constant}
    arch = student_arch(width, config.depth, config.size)
    thresholds = {
        "min_cosine": found.min_cosine,
        "holdout_min_cosine": found.holdout_min_cosine,
    }
    card = {
        "teacher": config.teacher,
        "licence": "Apache-2.0",
        "steps": config.steps,
        "batch": config.batch,
        "seed": config.seed,
        "measured": found.measured,
    }
    described = copy_description(config.out.stem, arch, head)
    return described | {"thresholds": thresholds, "card": card}


class CopyDescriptor(nn.Module):
    """Images (B, 3, size, size) -> (B, dim + PATTERNS) unit norm; `learned` is trained."""

    def __init__(self, backbone: VisionTransformer, dim: int, seed: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2 * backbone.embed_dim, dim)
        self.brightness = BrightnessPattern(backbone.patch_embed.img_size[0], seed)

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 2 * width): CLS, and GeM of the patch tokens (Radenovic et al. 2018)."""
        tokens = self.backbone.forward_features(images)
        patches = tokens[:, 1:].clamp(min=1e-6).pow(GEM_POWER).mean(dim=1).pow(1 / GEM_POWER)
        return torch.cat([tokens[:, 0], patches], dim=1)

    def learned(self, images: torch.Tensor) -> torch.Tensor:
        """(B, dim) unit norm."""
        return functional.normalize(self.head(self.pooled(images)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        learned = self.learned(images)
        pattern = self.brightness(images, learned)
        return torch.cat([learned * (1 - SHARE) ** 0.5, pattern * SHARE**0.5], dim=1)


def split_holdout(images: list[Path], share: float) -> tuple[list[Path], list[Path]]:
    """(training images, held-out ones): held out where the name's hash is below `share`.

    A name's side depends on nothing else, so a benchmark that orders by `name_hash` finds them.
    """
    held = [path for path in images if name_hash(path) < share]
    return [path for path in images if name_hash(path) >= share], held


def name_hash(path: Path) -> float:
    """Uniform in [0, 1), from the file's name alone."""
    return int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:4], "big") / 2**32


def squash(image: Image.Image, size: int) -> Image.Image:
    """The whole image at size x size, its aspect ignored: nothing is cut off before comparing."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


class Views:
    """Two views of each image of a step, as a function of (seed, step) alone."""

    def __init__(self, images: list[Path], config: CopyConfig) -> None:
        self.images = images
        self.config = config

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(2B, 3, size, size) pixels and (2B,) image numbers; an image's views are B apart."""
        numbers = self._numbers(step)
        rng = np.random.default_rng([self.config.seed, 1, step])
        pixels = [load_rgb(self.images[number]) for number in numbers]
        others = [pixels[(i + 1) % len(pixels)] for i in range(len(pixels))]
        first = [
            light_copy(image, rng) if rng.random() < 0.5 else edited_copy(image, other, rng)
            for image, other in zip(pixels, others, strict=True)
        ]
        second = [edited_copy(i, o, rng) for i, o in zip(pixels, others, strict=True)]
        views = to_batch([squash(view, self.config.size) for view in first + second])
        return views, torch.from_numpy(np.concatenate([numbers, numbers]))

    def _numbers(self, step: int) -> NDArray[np.int64]:
        """Distinct images: whole batches of an order drawn anew for each pass."""
        per_pass = len(self.images) // self.config.batch
        rng = np.random.default_rng([self.config.seed, 0, step // per_pass])
        start = step % per_pass * self.config.batch
        order: NDArray[np.int64] = rng.permutation(len(self.images))
        return order[start : start + self.config.batch]


class Memory:
    """The last views' descriptors, as more negatives than a batch can hold."""

    def __init__(self, size: int, dim: int) -> None:
        self.size = size
        self.views = torch.empty(0, dim)
        self.ids = torch.empty(0, dtype=torch.int64)

    def add(self, views: torch.Tensor, ids: torch.Tensor) -> None:
        self.views = torch.cat([views.detach(), self.views])[: self.size]
        self.ids = torch.cat([ids, self.ids])[: self.size]


def initial_model(config: CopyConfig) -> CopyDescriptor:
    """The teacher's first blocks, of which the last `trained_blocks` will learn, under a head."""
    teacher = load_vit(config.teacher, config.teacher_weights)
    if config.depth > len(teacher.blocks):
        raise UserError(f"--depth {config.depth}: the teacher has {len(teacher.blocks)} blocks")
    backbone = build_vit(student_arch(teacher.embed_dim, config.depth, config.size), config.seed)
    if not same_layers(teacher, backbone):
        raise UserError(f"--teacher {config.teacher}: its blocks have layers a plain ViT lacks")
    grid = [config.size // PATCH] * 2
    teacher.pos_embed = nn.Parameter(
        resample_abs_pos_embed(teacher.pos_embed, grid, num_prefix_tokens=1)
    )
    copy_blocks(teacher, backbone, list(range(config.depth)))
    backbone.requires_grad_(False)
    backbone.blocks[-config.trained_blocks :].requires_grad_(True)
    backbone.norm.requires_grad_(True)
    return CopyDescriptor(backbone, config.dim, config.seed)


def whiten_start(model: CopyDescriptor, images: Sequence[Path]) -> None:
    """Start the head as a whitening of unedited images: it halves a random start's wrong links."""
    matrix, offset = whitening(_rows(model, model.pooled, images))
    with torch.no_grad():
        dim = min(len(matrix), len(model.head.weight))
        for parameter, values in ((model.head.weight, matrix), (model.head.bias, offset)):
            parameter.zero_()
            parameter[:dim] = values[:dim]


def whiten_end(model: CopyDescriptor, images: Sequence[Path]) -> None:
    """Fold a whitening of the descriptors into the head, as SSCD does before it compares."""

    def before_norm(pixels: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = model.head(model.pooled(pixels))
        return rows

    matrix, offset = whitening(_rows(model, before_norm, images))
    with torch.no_grad():
        model.head.bias.copy_(matrix @ model.head.bias + offset)
        model.head.weight.copy_(matrix @ model.head.weight)


def whitening(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, D) rows -> matrix (D, D) and offset (D,): matrix @ row + offset has mean 0 and nearly
    equal variances, the largest first. The floor keeps directions that hardly vary from being
    blown up to noise; directions that M rows do not show become 0."""
    mean = rows.mean(dim=0)
    _, singular, directions = torch.linalg.svd(rows - mean, full_matrices=False)
    deviation = singular / len(rows) ** 0.5
    matrix = torch.zeros(rows.shape[1], rows.shape[1])
    matrix[: len(deviation)] = directions / (deviation[:, None] + WHITENING_FLOOR * deviation[0])
    return matrix, -matrix @ mean


def _rows(
    model: CopyDescriptor, run: Callable[[torch.Tensor], torch.Tensor], images: Sequence[Path]
) -> torch.Tensor:
    """`run` of up to about WHITENING_IMAGES unedited images, evenly spread."""
    size = model.backbone.patch_embed.img_size[0]
    some = images[:: max(1, len(images) // WHITENING_IMAGES)]
    with torch.inference_mode():
        parts = [
            run(to_batch([squash(load_rgb(path), size) for path in some[start : start + 32]]))
            for start in range(0, len(some), 32)
        ]
    return torch.cat(parts)


def train(config: CopyConfig, key: str, model: CopyDescriptor, images: list[Path]) -> None:
    """Train in place, going on from the checkpoint of the same configuration."""
    views = Views(images, config)
    memory = Memory(config.memory, config.dim)
    learned = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(learned, config.lr, weight_decay=config.weight_decay)
    path = checkpoint_path(config.out)
    first = 0
    if saved := load_checkpoint(path, key):
        first, state = saved
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        memory.views, memory.ids = state["memory_views"], state["memory_ids"]
        print(f"going on after step {first}", flush=True)
    else:
        whiten_start(model, images)
    recent: list[tuple[float, float]] = []
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, config.steps, config.steps // 20, config.lr, 1e-6)
        pixels, ids = views.batch(step)
        descriptors = model.learned(pixels)
        contrast = info_nce(descriptors, ids, memory.views, memory.ids, TEMPERATURE)
        entropy = entropy_loss(descriptors, ids, memory.views, memory.ids)
        optimizer.zero_grad(set_to_none=True)
        loss = contrast + config.entropy_weight * entropy
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(learned, 3.0)
        optimizer.step()
        memory.add(descriptors, ids)
        recent.append((contrast.item(), entropy.item()))
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"memory_views": memory.views, "memory_ids": memory.ids}
            save_checkpoint(path, key, step + 1, state)
            means = np.mean(recent, axis=0)
            print(
                f"step {step + 1}/{config.steps} contrast {means[0]:.3f} entropy {means[1]:.3f}",
                flush=True,
            )
            recent.clear()
