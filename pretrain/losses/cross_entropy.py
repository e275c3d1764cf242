"""Cross-entropy of student features against soft targets, without ever holding all logits.

With 131,072 prototypes the logits of a batch are the largest tensor of a step, and the gradient is
as large again. Here a chunk of rows goes through product, log-softmax, loss and both gradients at
once; what stays is the size of the features and of the prototypes, and backward only scales.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from pretrain.heads import factored, lengths
from pretrain.products import product
from pretrain.scores import (
    BLOCK,
    Factored,
    blocks,
    chunk_rows,
    chunks,
    logits_into,
    logits_of,
    on_cpu,
    softmax_,
    softmax_into,
)

HALF_SCALE = 64.0  # |gradient by logits| <= 2 times this times 256 rows is still finite in fp16
HALF_ROWS = 256


Losses = tuple[torch.Tensor, torch.Tensor]  # their sum, with a gradient; (terms,) without one


@dataclass(frozen=True)
class Term:
    """Student rows that follow each other, and what they are compared with."""

    targets: Callable[[int, int], torch.Tensor]  # (start, stop) of its rows -> (n, K) fp32
    weights: torch.Tensor  # (rows,) fp32
    mass: float = 1.0  # what a row of the targets sums to


def soft_cross_entropy(
    features: torch.Tensor,
    prototypes: tuple[torch.Tensor, torch.Tensor],
    terms: Sequence[Term],
    temperature: float,
    chunk_bytes: int | None = None,
) -> Losses:
    """Sum over all rows of weight * CE(target, softmax(logits / temperature)); and by term.

    features (N, d) fp32: the rows of all terms in their order; prototypes: (v (K, d), g (K, 1)) of
    a weight-normalised layer. Softmax and sums in fp32; products in the autocast dtype, else in
    v's. Gradients exist before backward is called, and are those of the sum.
    """
    rows = chunk_rows(prototypes[0], chunk_bytes)
    losses: Losses = _SoftCrossEntropy.apply(features, *prototypes, tuple(terms), temperature, rows)
    return losses


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        weight_v: torch.Tensor,
        weight_g: torch.Tensor,
        terms: tuple[Term, ...],
        temperature: float,
        rows: int,
    ) -> Losses:
        length = lengths(weight_v)
        prototypes = factored(weight_v, weight_g / length)
        with torch.autocast(features.device.type, enabled=False):
            most = max((len(term.weights) for term in terms), default=0)
            work = _Accumulator(features, prototypes, temperature, max(1, min(rows, most)))
            losses = torch.stack([work.add(term) for term in terms])
            by_g = _through_norm(work.by_weight, weight_v, weight_g, length)
        ctx.save_for_backward(work.by_features, work.by_weight, by_g)
        ctx.dtypes = (features.dtype, weight_v.dtype, weight_g.dtype)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_sum: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        # In place: the buffers are as large as the prototypes, and nobody reads them again.
        gradients = [
            gradient.mul_(by_sum).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, None, None, None)


class _Accumulator:
    """Goes over the rows in chunks and gathers the gradients."""

    def __init__(
        self, features: torch.Tensor, prototypes: Factored, temperature: float, rows: int
    ) -> None:
        self.features, self.temperature = features, temperature
        self.prototypes, self.weight = prototypes, prototypes[0]
        self.half = self.weight.dtype == torch.float16
        self.rows = min(rows, HALF_ROWS) if self.half else rows
        self.by_features = torch.empty_like(features, dtype=torch.float32)
        self.by_weight = torch.empty_like(self.weight, dtype=torch.float32)
        if not len(features):
            self.by_weight.zero_()
        # Chunks lie in the same memory: the system would clear new memory for each.
        self.logits = features.new_empty(self.rows, len(self.weight), dtype=torch.float32)
        self.done = 0

    def add(self, term: Term) -> torch.Tensor:
        """The term's loss, a scalar."""
        total = term.weights.new_zeros(())
        for start, stop in chunks(len(term.weights), self.rows):
            total += self._chunk(term, start, stop)
        self.done += len(term.weights)
        return total

    def _chunk(self, term: Term, start: int, stop: int) -> torch.Tensor:
        where = slice(self.done + start, self.done + stop)
        features, weights = self.features[where], term.weights[start:stop, None]
        logits = self.logits[: stop - start]
        warm = (features / self.temperature).to(self.weight.dtype)
        targets = term.targets(start, stop)
        if on_cpu(logits):
            logits_into(logits, warm, self.prototypes)
            # (n, 1, K) @ (n, K, 1): unlike a product and a sum, it makes no third matrix.
            by_row = torch.bmm(targets[:, None], logits[:, :, None]).view(-1)
            by_row -= term.mass * softmax_(logits)
        else:
            low = logits_of(warm, self.prototypes)
            by_row = (targets * low).sum(dim=1)
            by_row -= term.mass * softmax_into(logits, low)
        loss: torch.Tensor = -(by_row @ weights[:, 0])
        if term.mass != 1:
            logits.mul_(term.mass)
        # Weights go on the small sides of the products.
        self._gradients(logits.sub_(targets), where, features, weights / self.temperature)
        return loss

    def _gradients(
        self, by_logits: torch.Tensor, where: slice, features: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """From (n, K) by the logits of the rows `where`, but for the weights (n, 1)."""
        (weight, factor), dtype = self.prototypes, self.weight.dtype
        by_features = self.by_features[where].zero_()
        # In fp16 a probability of 1 / 131,072 would be lost, and the weights: both come near 1.
        scale, largest = 1.0, weights.new_ones(())
        if self.half:
            scale = HALF_SCALE
            largest = weights.amax().clamp(min=torch.finfo(torch.float32).tiny)
            by_logits.mul_(scale)
        weighted = (features * (weights / largest)).to(dtype)
        for block in blocks(weight):
            low = by_logits[:, block].to(dtype)
            here = product(low.T, weighted)
            if factor is not None:
                low = low * factor[block].T
            by_features += product(low, weight[block])
            if self.half:
                here = here.float().mul_(largest / scale)
            if where.start == 0:
                self.by_weight[block] = here
            else:
                self.by_weight[block] += here
        by_features.mul_(weights / scale)


def _through_norm(
    by_weight: torch.Tensor, weight_v: torch.Tensor, weight_g: torch.Tensor, length: torch.Tensor
) -> torch.Tensor:
    """Turns the gradient by w = g v / |v| into that by v, in place, and returns that by g."""
    by_g = torch.empty_like(length)
    for start in range(0, len(by_weight), BLOCK):  # else a third matrix of this size
        block = slice(start, start + BLOCK)
        v, by_w, inverse = weight_v[block].float(), by_weight[block], 1 / length[block]
        along = (v * by_w).sum(dim=1, keepdim=True) * inverse
        by_g[block] = along
        by_w.addcmul_(v, along * inverse, value=-1).mul_(weight_g[block] * inverse)
    return by_g
