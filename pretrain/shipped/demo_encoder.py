"""`pretrain demo-encoder`: a small ViT/16 learns a larger timm encoder's features."""

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

from pretrain.errors import UserError
from pretrain.shipped.checkpoint import (
    checkpoint_path,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
)
from pretrain.shipped.export import semantic_description, write_weights
from pretrain.shipped.images import readable_images
from pretrain.shipped.schedules import warmup_cosine
from pretrain.shipped.timm_models import (
    build_vit,
    copy_blocks,
    load_vit,
    needed_blocks,
    same_layers,
    student_arch,
)
from pretrain.shipped.windows import TeacherFeatures, Windows, token_features

SAMPLE = 32  # windows on which the teacher's blocks are compared


@dataclass(frozen=True)
class DemoEncoderConfig:
    """What decides the student's weights, byte for byte on one thread."""

    teacher: str
    teacher_weights: Path
    images: tuple[Path, ...]
    out: Path
    depth: int = 8
    width: int = 192
    windows: int = 6  # of each image
    steps: int = 3000
    batch: int = 64
    lr: float = 5e-4
    weight_decay: float = 0.02
    patch_weight: float = 0.5
    seed: int = 0
    checkpoint_every: int = 50  # steps


def demo_encoder(config: DemoEncoderConfig) -> None:
    """Train (or go on after a kill) and write the student's fp16 weights with their description."""
    if config.width % 64 or config.width < 64:
        raise UserError(f"--width {config.width}: must be a multiple of 64")
    started = time.monotonic()
    teacher = load_vit(config.teacher, config.teacher_weights)
    if config.depth > len(teacher.blocks):
        raise UserError(f"--depth {config.depth}: the teacher has {len(teacher.blocks)} blocks")
    images, unreadable = readable_images(config.images)
    print(f"{len(images)} images, {unreadable} unreadable ones left out", flush=True)
    files = [str(path) for path in images]
    key = fingerprint({**asdict(config), "files": files})
    windows = Windows(images, config.windows, config.seed)
    features = TeacherFeatures(_features_folder(config, files), windows)
    features.compute(teacher, config.batch)

    student = _train(config, key, teacher, windows, features)
    description = semantic_description(config.out.stem, student_arch(config.width, config.depth))
    description["card"] = {
        "teacher": config.teacher,
        "licence": "Apache-2.0",
        "images": len(images),
        "windows": len(windows),
        "steps": config.steps,
        "batch": config.batch,
        "seed": config.seed,
    }
    write_weights(config.out, student.vit.state_dict(), description)
    checkpoint_path(config.out).unlink(missing_ok=True)
    shutil.rmtree(features.folder)
    print(f"wrote {config.out} ({time.monotonic() - started:.0f} s in this run)", flush=True)


def _features_folder(config: DemoEncoderConfig, files: list[str]) -> Path:
    """Beside --out, and shared by trainings that differ only in what the teacher does not see."""
    seen = [config.teacher, str(config.teacher_weights), config.windows, config.seed, files]
    return config.out.with_name(f"{config.out.name}.features-{fingerprint({'seen': seen})}")


class Student(nn.Module):
    """The ViT that is kept, and a projection to the teacher's width that is not."""

    def __init__(self, vit: VisionTransformer, teacher_width: int) -> None:
        super().__init__()
        self.vit = vit
        same = vit.embed_dim == teacher_width
        self.projection = nn.Identity() if same else nn.Linear(vit.embed_dim, teacher_width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 224, 224) -> (B, 50, teacher width)."""
        projected: torch.Tensor = self.projection(self.vit.forward_features(images))
        return token_features(projected)


def _first_blocks(
    config: DemoEncoderConfig, teacher: VisionTransformer, windows: Windows
) -> list[int]:
    """Teacher blocks that the student starts from; none where their layers differ from its own."""
    if not same_layers(teacher, build_vit(student_arch(config.width, config.depth), config.seed)):
        return []
    apart = np.linspace(0, len(windows) - 1, SAMPLE, dtype=np.int64)
    return needed_blocks(teacher, windows.batch(apart), config.depth)


def _student(config: DemoEncoderConfig, teacher: VisionTransformer, blocks: list[int]) -> Student:
    """Up to the first teacher block that it lacks, the student is the teacher, and stays so."""
    vit = build_vit(student_arch(config.width, config.depth), config.seed)
    if blocks:
        copy_blocks(teacher, vit, blocks)
        same = sum(place == block for place, block in enumerate(blocks))
        vit.requires_grad_(False)
        vit.blocks[same:].requires_grad_(True)
        vit.norm.requires_grad_(True)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return Student(vit, teacher.embed_dim)


def regression_loss(
    student: torch.Tensor, teacher: torch.Tensor, patch_weight: float
) -> torch.Tensor:
    """(B, 50, D) features -> scalar. CLS: 1 - cosine plus squared error relative to the teacher's
    norm; patches: the relative squared error only, times `patch_weight`."""
    relative = (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-6)
    cosine = functional.cosine_similarity(student[:, 0], teacher[:, 0], dim=-1)
    cls = (1.0 - cosine + relative[:, 0]).mean()
    return cls + patch_weight * relative[:, 1:].mean()


def _train(
    config: DemoEncoderConfig,
    key: str,
    teacher: VisionTransformer,
    windows: Windows,
    features: TeacherFeatures,
) -> Student:
    path = checkpoint_path(config.out)
    first, state = load_checkpoint(path, key) or (0, {})
    blocks = state["blocks"] if state else _first_blocks(config, teacher, windows)
    student = _student(config, teacher, blocks)
    learned = [value for value in student.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(learned, config.lr, weight_decay=config.weight_decay)
    if state:
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
    print(f"from step {first}; started from the teacher's blocks {blocks}", flush=True)
    recent: list[float] = []
    for step in range(first, config.steps):
        numbers = _batch_numbers(config, step, len(windows))
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, config.steps, config.steps // 20, config.lr, 1e-6)
        predicted = student(windows.batch(numbers))
        loss = regression_loss(predicted, features.batch(numbers), config.patch_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(learned, 3.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            state = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(path, key, step + 1, state | {"blocks": blocks})
            print(f"step {step + 1}/{config.steps} loss {np.mean(recent):.4f}", flush=True)
            recent.clear()
    return student


def _batch_numbers(config: DemoEncoderConfig, step: int, windows: int) -> np.ndarray:
    """The step's windows: an order drawn anew for each pass, from the seed and the pass alone."""
    position = np.arange(step * config.batch, (step + 1) * config.batch)
    epochs = position // windows
    orders = {
        e: np.random.default_rng([config.seed, int(e)]).permutation(windows) for e in set(epochs)
    }
    return np.array([orders[e][p] for e, p in zip(epochs, position % windows, strict=True)])
