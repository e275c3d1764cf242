"""`pretrain evaluate`: kNN and linear probe of a run's teacher on labelled images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain import precision
from pretrain.export import load_run
from pretrain.knn_eval import (
    Features,
    effective_rank,
    extract,
    held_out,
    knn_accuracy,
    linear_accuracy,
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
    size = what.size or config.crops.global_size
    size -= size % config.model.patch_size
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
        apart = held_out(len(train.labels))
        train, test = train.only(~apart), train.only(apart)
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
