"""`pretrain evaluate`: kNN and linear probe of a run's teacher on labelled images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain import precision
from pretrain.errors import UserError
from pretrain.export import load_run
from pretrain.knn_eval import (
    Features,
    effective_rank,
    extract,
    knn_accuracy,
    linear_accuracy,
    parted,
)
from pretrain.labelled import LabelledLoader, open_labelled


@dataclass(frozen=True)
class Evaluation:
    """`train` and `test` hold a folder a class; without `test` a fifth of `train` is tested."""

    train: str
    test: str = ""
    size: int = 0  # pixels; 0: the global crops' of the run
    batch: int = 64
    workers: int = 4


def evaluate(run: Path, what: Evaluation) -> dict[str, Any]:
    """Accuracies of the last checkpoint. Errors: UserError."""
    config, model, iterations = load_run(run)
    device = precision.this_device(0)
    chosen = precision.choose(config.parallel.precision, device)
    backbone = model.teacher["backbone"].to(device)
    patch = config.model.patch_size
    if what.size < 0 or 0 < what.size < patch:
        raise UserError(f"--size {what.size}: must be {patch} or more, the side of a patch")
    if what.workers < 0:
        raise UserError(f"--workers {what.workers}: must be 0 or more")
    size = what.size or config.crops.global_size
    size -= size % patch
    known = open_labelled(what.train)
    loader = LabelledLoader(known, what.batch, size, what.workers)
    train = extract(backbone, loader, chosen)
    bad = len(loader.bad)
    if what.test:
        other = open_labelled(what.test, classes=known.classes)
        loader = LabelledLoader(other, what.batch, size, what.workers)
        test = extract(backbone, loader, chosen)
        bad += len(loader.bad)
    else:
        train, test = parted(train)
    return {
        "iterations": iterations,
        "classes": len(known.classes),
        "train_images": len(train.labels),
        "test_images": len(test.labels),
        "bad_images": bad,
        "knn_accuracy": knn_accuracy(train, test),
        "linear_accuracy": linear_accuracy(train, test)["accuracy"],
        "feature_rank": _rank(train),
    }


def _rank(features: Features) -> float:
    return effective_rank(features.cls)
