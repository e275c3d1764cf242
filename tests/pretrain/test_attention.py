"""Attention in bf16 on a CPU, against torch's own in fp64."""

from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import attention as module
from pretrain.attention import attention


def exact(packed: torch.Tensor) -> torch.Tensor:
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    out = functional.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("shape", [(2, 50, 3, 6, 64), (3, 7, 3, 2, 16), (1, 1, 3, 1, 8)])
def test_outputs_and_gradients_are_those_of_torch(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    packed = (2 * torch.randn(shape)).bfloat16().requires_grad_()
    true = packed.detach().double().requires_grad_()
    found, expected = attention(packed), exact(true)
    weights = torch.randn_like(expected)
    found.backward(weights.bfloat16())
    expected.backward(weights)
    assert packed.grad is not None
    assert true.grad is not None
    for ours, theirs in ((found, expected), (packed.grad, true.grad)):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() < 0.01 * theirs.norm()


def test_large_scores_stay_finite() -> None:
    packed = torch.full((1, 5, 3, 1, 64), 200.0, dtype=torch.bfloat16, requires_grad=True)
    out = attention(packed)
    out.sum().backward()
    assert packed.grad is not None
    assert torch.isfinite(out).all()
    assert torch.isfinite(packed.grad).all()


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest matrices of scores or weights that are made."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.bytes = n, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.shape[-2:] == (self.n, self.n):
            self.bytes = max(self.bytes, made.nbytes)
        return made


def test_scratch_is_bounded_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five heads at a time of twelve."""
    torch.manual_seed(0)
    given = torch.randn(2, 50, 3, 6, 16).bfloat16()
    found, largest = [], []
    for scratch in (module.SCRATCH, 5 * 3 * 50 * 50 * 2 + 1, 1):
        monkeypatch.setattr(module, "SCRATCH", scratch)
        packed = given.clone().requires_grad_()
        with Largest(50) as made:
            out = attention(packed)
            out.square().sum().backward()
        assert packed.grad is not None
        found.append(torch.cat([out.flatten(), packed.grad.flatten()]))
        largest.append(made.bytes)
    assert largest == [heads * 50 * 50 * 2 for heads in (12, 5, 1)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
