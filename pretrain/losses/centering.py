"""Teacher scores -> targets: Sinkhorn-Knopp, or softmax after subtracting a running centre.

Both balance the prototypes by one number each, which is added to the scores / temperature of every
row; the softmax of the sum is the target. So only (K,) offsets need be kept, and targets are made
for the rows that a chunk of the cross-entropy wants. Those of few scores are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from pretrain.scores import Scores, softmax_

TINY, LOWEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).min


def _alone(value: torch.Tensor) -> torch.Tensor:
    return value


@dataclass(frozen=True)
class AllReduce:
    """How values of all ranks become one: losses know no process group."""

    sum: Callable[[torch.Tensor], torch.Tensor] = _alone
    max: Callable[[torch.Tensor], torch.Tensor] = _alone


ALONE = AllReduce()


@dataclass(frozen=True)
class Targets:
    """(M, K) targets, made when they are asked for unless they are few; rows sum to 1."""

    scores: Scores
    temperature: float
    offsets: torch.Tensor  # (K,) fp32
    kept: torch.Tensor | None = None  # (M, K) fp32

    def __len__(self) -> int:
        return len(self.scores)

    @torch.no_grad()
    def rows(self, start: int, stop: int) -> torch.Tensor:
        """(stop - start, K) fp32, not to be written into."""
        if self.kept is not None:
            return self.kept[start:stop]
        targets = self.scores.rows(start, stop, self.temperature).add_(self.offsets)
        softmax_(targets)
        return targets


@torch.no_grad()
def sinkhorn_knopp(
    scores: Scores, temperature: float, iterations: int = 3, reduce: AllReduce = ALONE
) -> Targets:
    """DINOv2's Sinkhorn-Knopp over the rows of all ranks, which may have unlike numbers, also none.

    E = exp(scores / temperature) is to become diag(rows) E diag(columns), with rows that sum to 1
    and columns of equal sums. The masses that the paper divides by (number of prototypes, number
    of rows of all ranks) scale everything alike and cancel, so they are left out. Ranks with few
    scores and with many say the same to each other: what each column's mass has become.
    """
    with torch.autocast(scores.features.device.type, enabled=False):
        balance = _balance_few if scores.few else _balance
        return balance(scores, temperature, iterations, reduce)


def _balance(scores: Scores, temperature: float, iterations: int, reduce: AllReduce) -> Targets:
    """Remembers masses of columns only: an iteration ends with rows that sum to 1, a softmax."""
    mass = _first_mass(scores, temperature, reduce)
    for _ in range(iterations - 1):
        offsets, after = -mass.log(), torch.zeros_like(mass)
        for part in scores.parts(temperature):
            softmax_(part.add_(offsets))
            after += part.new_ones(len(part)) @ part
        mass = reduce.sum(after.mul_(mass)).clamp_(min=TINY)
    return Targets(scores, temperature, -mass.log())


def _balance_few(scores: Scores, temperature: float, iterations: int, reduce: AllReduce) -> Targets:
    """With E in memory, which is never rewritten: only the two vectors change."""
    exponentials, lse = scores.softmax(temperature)
    top = reduce.max(torch.cat([lse, lse.new_full((1,), LOWEST)]).max())
    rows = (lse - top).exp_()
    for _ in range(iterations):
        columns = reduce.sum(rows @ exponentials).clamp_(min=TINY).reciprocal_()
        rows = (exponentials @ columns).clamp_(min=TINY).reciprocal_()
    kept = exponentials.mul_(columns).mul_(rows[:, None])
    return Targets(scores.size_only(), temperature, columns.log(), kept)


def _first_mass(scores: Scores, temperature: float, reduce: AllReduce) -> torch.Tensor:
    """(K,) sums of exp(scores / temperature) over all rows of all ranks, but for a factor.

    By softmax, so that no score overflows; what it takes from a row is given back in its weight.
    """
    top = scores.features.new_tensor(LOWEST)
    mass = scores.features.new_zeros(len(scores.prototypes))
    for part in scores.parts(temperature):
        lse = softmax_(part)
        higher = torch.maximum(top, lse.max())
        mass = mass * (top - higher).exp() + (lse - higher).exp() @ part
        top = higher
    highest = reduce.max(top.clone())
    return reduce.sum(mass * (top - highest).exp()).clamp_(min=TINY)


class SoftmaxCenter(nn.Module):
    """Softmax of centred scores; the centre is a running mean that lags one step."""

    center: torch.Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes))

    @torch.no_grad()
    def forward(self, scores: Scores, temperature: float, reduce: AllReduce = ALONE) -> Targets:
        """Targets of scores, which the centre then takes in.

        The mean is over the rows of all ranks, so that their number makes no difference.
        """
        targets = Targets(scores, temperature, self.center / -temperature)
        if scores.few:
            kept = targets.rows(0, len(scores))
            targets = replace(targets, scores=scores.size_only(), kept=kept)
        total = torch.cat([scores.sum(), self.center.new_tensor([len(scores)])])
        total = reduce.sum(total)
        self.center.lerp_(total[:-1] / total[-1].clamp(min=1), 1 - self.momentum)
        return targets
