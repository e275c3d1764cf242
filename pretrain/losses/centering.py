"""Teacher scores -> targets: Sinkhorn-Knopp, or softmax after subtracting a running centre."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


def _alone(value: torch.Tensor) -> torch.Tensor:
    return value


@dataclass(frozen=True)
class AllReduce:
    """How values of all ranks become one: losses know no process group."""

    sum: Callable[[torch.Tensor], torch.Tensor] = _alone
    max: Callable[[torch.Tensor], torch.Tensor] = _alone


ALONE = AllReduce()


@torch.no_grad()
def sinkhorn_knopp(
    logits: torch.Tensor, temperature: float, iterations: int = 3, reduce: AllReduce = ALONE
) -> torch.Tensor:
    """(M, K) scores of this rank, overwritten -> (M, K) fp32 targets whose rows sum to 1.

    DINOv2's Sinkhorn-Knopp over the rows of all ranks; they may have unlike numbers of rows, also
    none. The matrix is never rewritten between iterations: it is diag(rows) E diag(columns), and
    only the two vectors change. The masses that the paper divides by (number of prototypes, number
    of rows of all ranks) scale everything alike and cancel, so they are left out. E is the
    softmax, so that no score overflows; what it took from a row is given back in `rows`.
    """
    with torch.autocast(logits.device.type, enabled=False):
        scores = logits.float().div_(temperature)
        exponentials = torch.softmax(scores, dim=1)
        # log sum exp by row, from the largest entry: log p = score - lse
        lse = scores.amax(dim=1) - exponentials.amax(dim=1).log()
        del scores
        top = torch.cat([lse, lse.new_full((1,), -torch.inf)]).max()
        rows = (lse - reduce.max(top)).exp()
        tiny = torch.finfo(torch.float32).tiny
        for _ in range(iterations):
            mass = reduce.sum(rows @ exponentials)  # (K,) of each prototype
            columns = mass.clamp_(min=tiny).reciprocal_()
            rows = (exponentials @ columns).clamp_(min=tiny).reciprocal_()
        return exponentials.mul_(columns).mul_(rows[:, None])


class SoftmaxCenter(nn.Module):
    """Softmax of centred scores; the centre is a running mean that lags one step."""

    center: torch.Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes))

    @torch.no_grad()
    def forward(
        self, logits: torch.Tensor, temperature: float, reduce: AllReduce = ALONE
    ) -> torch.Tensor:
        """(M, K) scores -> (M, K) fp32 targets; then the centre takes these scores in.

        The mean is over the rows of all ranks, so that their number makes no difference.
        """
        logits = logits.float()
        targets = torch.softmax((logits - self.center).div_(temperature), dim=1)
        total = torch.cat([logits.sum(dim=0), logits.new_tensor([len(logits)])])
        total = reduce.sum(total)
        self.center.lerp_(total[:-1] / total[-1].clamp(min=1), 1 - self.momentum)
        return targets
