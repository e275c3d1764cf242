"""Linear layers in fp32 on a CPU by oneDNN, which torch has but hands no fp32 products to.

It gives them to MKL, which leaves half of an AMD processor's vector unit unused; oneDNN does as
much as it on Intel. Everywhere else these are torch's own.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_AVAILABLE = hasattr(torch.ops.mkldnn, "_linear_pointwise")
_unwanted = ContextVar("_unwanted", default=False)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(…, I), (O, I), (O,) -> x @ weight.T + bias (…, O); as functional.linear, autocast too."""
    if _by_onednn(x) and weight.dtype == torch.float32:
        out: torch.Tensor = _Linear.apply(x, weight, bias)
        return out
    return functional.linear(x, weight, bias)


class Linear(nn.Linear):
    """torch's, by `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(M, I) @ (I, N) without a gradient, in the dtype of both; any strides."""
    return _onednn(left, right.T, None) if _by_onednn(left) else left @ right


@contextlib.contextmanager
def unwanted() -> Iterator[None]:
    """Within, `linear` leaves its result undefined: only what its backward needs is wanted."""
    token = _unwanted.set(True)
    try:
        yield
    finally:
        _unwanted.reset(token)


def _by_onednn(x: torch.Tensor) -> bool:
    return (
        _AVAILABLE
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        if _unwanted.get():
            return x.new_empty(*x.shape[:-1], len(weight))
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, by_rows = x.flatten(0, -2), by_out.flatten(0, -2)
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = _onednn(by_out, weight.T, None)
        if ctx.needs_input_grad[1]:
            by_weight = _onednn(by_rows.T, rows.T, None)
        if ctx.needs_input_grad[2]:
            by_bias = by_rows.sum(dim=0)
        return by_x, by_weight, by_bias
