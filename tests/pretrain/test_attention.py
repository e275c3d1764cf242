"""Attention in bf16 on a CPU, against torch's own in fp64."""

import pytest
import torch
from torch.nn import functional

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
