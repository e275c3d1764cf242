"""What changes with the iteration: learning rates, weight decay, momentum, temperature.

Every schedule is an array with one value an iteration, so that a resumed run needs no state.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.ranges import Count, CountOrZero, NotNegative, Positive, Share

Values = NDArray[np.float64]


@dataclass(frozen=True)
class ScheduleConfig:
    """Defaults: DINOv2's long recipe (ViT-L and ViT-g at batch 3,072)."""

    iterations: Count = 625_000
    batch: Count = 3072  # images of all ranks together
    base_lr: NotNegative = 2e-4  # at batch 1,024
    min_lr: NotNegative = 1e-6
    warmup: CountOrZero = 100_000  # iterations
    last_layer_freeze: CountOrZero = 1250  # iterations
    weight_decay: NotNegative = 0.04
    final_weight_decay: NotNegative = 0.2
    momentum: Share = 0.994
    final_momentum: Share = 1.0
    teacher_temperature: Positive = 0.04
    final_teacher_temperature: Positive = 0.07
    temperature_warmup: CountOrZero = 37_500  # iterations


class Schedules(NamedTuple):
    """One value an iteration each."""

    lr: Values
    last_layer_lr: Values
    weight_decay: Values
    momentum: Values
    teacher_temperature: Values


def schedules(config: ScheduleConfig) -> Schedules:
    """All schedules of a run."""
    count = config.iterations
    lr = warmup_cosine(scaled_lr(config.base_lr, config.batch), config.min_lr, count, config.warmup)
    frozen = np.arange(count) < config.last_layer_freeze
    return Schedules(
        lr=lr,
        last_layer_lr=np.where(frozen, 0.0, lr),
        weight_decay=warmup_cosine(config.weight_decay, config.final_weight_decay, count),
        momentum=warmup_cosine(config.momentum, config.final_momentum, count),
        teacher_temperature=linear_then_constant(
            config.teacher_temperature,
            config.final_teacher_temperature,
            count,
            config.temperature_warmup,
        ),
    )


def scaled_lr(base: float, batch: int) -> float:
    """The learning rate of a batch: base * sqrt(batch / 1024)."""
    return float(base * (batch / 1024) ** 0.5)


def warmup_cosine(value: float, final: float, iterations: int, warmup: int = 0) -> Values:
    """Linear from 0 to `value` (both included) over `warmup`, then half a cosine towards `final`.

    Like the official code, the cosine stops one step short of `final`.
    """
    rising = np.linspace(0.0, value, min(warmup, iterations))
    left = iterations - len(rising)
    falling = final + 0.5 * (value - final) * (1 + np.cos(np.pi * np.arange(left) / max(left, 1)))
    return np.concatenate([rising, falling])


def linear_then_constant(first: float, last: float, iterations: int, ramp: int) -> Values:
    """Linear from `first` to `last` (both included) over `ramp` iterations, then `last`."""
    constant = np.full(max(iterations - ramp, 0), last)
    return np.concatenate([np.linspace(first, last, ramp), constant])[:iterations]
