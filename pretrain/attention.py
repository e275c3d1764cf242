"""Softmax attention inside sequences of one length.

By torch's kernel, but in bf16 on a CPU by plain products, which there take half of its time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

SCRATCH = 64 << 20  # bytes of what every query has with every key, at most; but one head's


def attention(packed: torch.Tensor) -> torch.Tensor:
    """Queries, keys and values (B, N, 3, heads, d) -> (B, N, heads * d)."""
    plain = packed.device.type == "cpu" and packed.dtype == torch.bfloat16
    if plain and not torch.compiler.is_compiling():
        out: torch.Tensor = _Attention.apply(packed)
        return out
    # Taken apart as it lies: the gradient is put together in one copy.
    query, key, value = (part.transpose(1, 2) for part in packed.unbind(2))
    attended = functional.scaled_dot_product_attention(query, key, value)
    return attended.transpose(1, 2).flatten(2)


class _Attention(torch.autograd.Function):
    """Keeps queries, keys and values alone: the weights are made again for the gradients."""

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor) -> torch.Tensor:
        query, key, value = (_by_head(packed[:, :, which]) for which in range(3))
        ctx.save_for_backward(query, key, value)
        ctx.shape = packed.shape
        b, n, _, heads, d = packed.shape
        attended = query.new_empty(query.shape)
        for some in _slices(query):
            torch.bmm(_weights(query[some], key[some]), value[some], out=attended[some])
        return attended.view(b, heads, n, d).transpose(1, 2).reshape(b, n, heads * d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_out: torch.Tensor) -> torch.Tensor:
        query, key, value = ctx.saved_tensors
        b, n, _, heads, d = ctx.shape
        by_out = _by_head(by_out.reshape(b, n, heads, d))
        grads = [query.new_empty(query.shape) for _ in range(3)]
        for some in _slices(query):
            own = query[some], key[some], value[some], by_out[some]
            _write_gradients(*own, [grad[some] for grad in grads])
        by_packed = by_out.new_empty(ctx.shape)
        for which, grad in enumerate(grads):
            by_packed[:, :, which] = grad.view(b, heads, n, d).transpose(1, 2)
        return by_packed


def _write_gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    by_out: torch.Tensor,
    into: list[torch.Tensor],
) -> None:
    """Of queries, keys and values (heads, N, d), into three tensors like them."""
    weights = _weights(query, key)
    by_weights = torch.bmm(by_out, value.transpose(1, 2))
    by_scores = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
    by_query, by_key, by_value = into
    d = query.shape[2]
    _scaled(by_scores, key, d, out=by_query)
    _scaled(by_scores.transpose(1, 2), query, d, out=by_key)
    torch.bmm(weights.transpose(1, 2), by_out, out=by_value)


def _slices(query: torch.Tensor) -> Iterator[slice]:
    """So many heads (of B * heads) at a time that three matrices of N x N each fit in SCRATCH."""
    total, n, _ = query.shape
    step = max(1, SCRATCH // (3 * n * n * query.element_size()))
    return (slice(at, at + step) for at in range(0, total, step))


def _by_head(x: torch.Tensor) -> torch.Tensor:
    """(B, N, heads, d) -> (B * heads, N, d)."""
    return x.transpose(1, 2).flatten(0, 1)


def _scaled(
    left: torch.Tensor, right: torch.Tensor, d: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """left @ right / sqrt(d)."""
    return torch.baddbmm(left.new_empty(1), left, right, beta=0, alpha=d**-0.5, out=out)


def _weights(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return torch.softmax(_scaled(query, key.transpose(1, 2), query.shape[2]), dim=-1)
