"""How good frozen features are: weighted kNN and a linear probe on labelled images."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pretrain.collate import normalise
from pretrain.config import Config
from pretrain.errors import UserError
from pretrain.labelled import Labelled, LabelledLoader, open_labelled
from pretrain.precision import Precision

NEIGHBOURS = 20
TEMPERATURE = 0.07
BLOCK = 1024  # queries that are compared at a time
TEST_SHARE = 0.2  # of the images of one folder, where none are set apart
L2 = tuple(10.0**power for power in range(-6, 2))
PROBE_STEPS = 100


@dataclass(frozen=True)
class Features:
    """Of n images: class tokens (n, D), means of the patch tokens (n, D), labels (n,); fp32."""

    cls: torch.Tensor
    patches: torch.Tensor
    labels: torch.Tensor

    def only(self, chosen: torch.Tensor) -> "Features":
        return Features(self.cls[chosen], self.patches[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Probe:
    """A labelled folder, for watching a run."""

    images: Labelled
    size: int
    batch: int
    workers: int

    @classmethod
    def of(cls, config: Config) -> "Probe":
        images = open_labelled(config.watch.evaluate_on)
        size = config.crops.global_size
        return cls(images, size, 64, config.data.workers)

    def measure(self, backbone: nn.Module, precision: Precision) -> dict[str, float]:
        """kNN accuracy over a fifth of the images by the others, and the features' rank.

        All ranks take part, since a sharded backbone needs them all.
        """
        loader = LabelledLoader(self.images, self.batch, self.size, self.workers)
        features = extract(backbone, loader, precision)
        accuracy = knn_accuracy(*parted(features))
        return {"knn_accuracy": accuracy, "feature_rank": effective_rank(features.cls)}


def held_out(count: int) -> torch.Tensor:
    """Which (n,) of `count` images are tested: the same in every run; of two or more, not none."""
    drawn = np.random.default_rng(0).random(count)
    chosen = drawn < TEST_SHARE
    if count > 1:
        chosen[drawn.argmin()], chosen[drawn.argmax()] = True, False
    return torch.from_numpy(chosen)


def parted(features: Features) -> tuple[Features, Features]:
    """(train, test), the latter a fifth. Errors: UserError for fewer than two images."""
    if len(features.labels) < 2:
        raise UserError("one labelled image only could be decoded; two are needed at the least")
    test = held_out(len(features.labels))
    return features.only(~test), features.only(test)


@torch.no_grad()
def extract(backbone: nn.Module, loader: LabelledLoader, precision: Precision) -> Features:
    """Features of all images, on the CPU. The backbone is left in the mode that it was in."""
    training = backbone.training
    backbone.eval()
    found: list[tuple[torch.Tensor, ...]] = []
    for crops, labels in loader:
        with precision.autocast():
            (tokens,) = backbone([normalise(crops, precision.device)])
        found.append(
            (tokens.cls.float().cpu(), tokens.patches.float().mean(dim=1).cpu(), labels.cpu())
        )
    backbone.train(training)
    if not found:
        raise UserError("no labelled image could be decoded")
    return Features(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def knn_accuracy(train: Features, test: Features, k: int = NEIGHBOURS) -> float:
    """Share of test images whose label the k nearest training images give, weighted by exp(cos/T).

    As DINO and DINOv2 evaluate (Wu et al. 2018): cosine of class tokens, T = 0.07.
    """
    base = functional.normalize(train.cls, dim=1)
    classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    right = 0
    for queries, labels in _blocks(functional.normalize(test.cls, dim=1), test.labels):
        cosine, place = (queries @ base.T).topk(min(k, len(base)), dim=1)
        votes = torch.zeros(len(queries), classes)
        votes.scatter_add_(1, train.labels[place], (cosine / TEMPERATURE).exp())
        right += int((votes.argmax(dim=1) == labels).sum())
    return right / len(test.labels)


def _blocks(
    rows: torch.Tensor, labels: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, len(rows), BLOCK):
        yield rows[start : start + BLOCK], labels[start : start + BLOCK]


def linear_accuracy(train: Features, test: Features) -> dict[str, Any]:
    """The best of logistic regressions on [class token, mean patch token], over weights of L2.

    The weight of L2 is chosen on a fifth of the training images; then all of them are used.
    """
    choosing = held_out(len(train.labels))
    few, check = _joined(train.only(~choosing)), _joined(train.only(choosing))
    scores = {l2: _fitted(few, train.only(~choosing).labels, l2)(check) for l2 in L2}
    wanted = train.only(choosing).labels
    best = max(L2, key=lambda l2: float((scores[l2].argmax(dim=1) == wanted).float().mean()))
    found = _fitted(_joined(train), train.labels, best)(_joined(test)).argmax(dim=1)
    return {"accuracy": float((found == test.labels).float().mean()), "l2": best}


def _joined(features: Features) -> torch.Tensor:
    return torch.cat([features.cls, features.patches], dim=1)


def _fitted(rows: torch.Tensor, labels: torch.Tensor, l2: float) -> nn.Module:
    """Logistic regression on standardised columns, by L-BFGS."""
    mean, std = rows.mean(dim=0), rows.std(dim=0, correction=0).clamp(min=1e-6)
    layer = nn.Linear(rows.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    inputs = (rows - mean) / std
    optimizer = torch.optim.LBFGS(
        layer.parameters(), max_iter=PROBE_STEPS, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(layer(inputs), labels) + l2 * layer.weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        layer.weight.div_(std)
        layer.bias.sub_(layer.weight @ mean)
    return layer.requires_grad_(False)


def effective_rank(features: torch.Tensor) -> float:
    """exp of the entropy of the singular values of (n, D) features (RankMe, Garrido et al. 2023).

    Falls towards 1 as features collapse.
    """
    values = torch.linalg.svdvals(features.double() - features.double().mean(dim=0))
    share = values / values.sum().clamp(min=1e-12)
    return float(torch.special.entr(share).sum().exp())
