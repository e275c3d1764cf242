"""Transformer block on packed tokens: crops of all sizes lie behind each other as (tokens, width).

Norms and linears see one long matrix. Attention runs apart for each group of equally long
sequences, so that shapes are static and no kernel of varying lengths is needed (RECIPE: exact, and
the same code on every GPU). Parameter names are those of facebookresearch/dinov2.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pretrain.attention import attention
from pretrain.products import Linear, linear, unwanted

NORM_EPS = 1e-6
Groups = tuple[tuple[int, int], ...]  # (sequences, tokens of each), in the order they are packed


class Kept(NamedTuple):
    """The part of the packed tokens that a residual branch is run on (stochastic depth)."""

    tokens: torch.Tensor  # (kept tokens,) int64, places among all packed tokens
    scale: torch.Tensor  # (kept tokens, 1): sequences / kept sequences of their group
    groups: Groups  # of the kept tokens


def draw_kept(groups: Groups, drop_path: float, device: torch.device) -> Kept:
    """Draws the sequences that go through one branch; the others skip it, and cost nothing.

    Each group of b sequences keeps max(int(b (1 - p)), 1), whose residuals are scaled by b / kept
    (DINOv2, "efficient stochastic depth"). Uses torch's global generator of `device`.
    """
    tokens, scales, kept_groups, start = [], [], [], 0
    for sequences, length in groups:
        kept = min(max(int(sequences * (1 - drop_path)), 1), sequences)
        chosen = torch.randperm(sequences, device=device)[:kept]
        places = start + chosen[:, None] * length + torch.arange(length, device=device)
        tokens.append(places.flatten())
        scales.append(torch.full((kept * length, 1), sequences / max(kept, 1), device=device))
        kept_groups.append((kept, length))
        start += sequences * length
    return Kept(torch.cat(tokens), torch.cat(scales), tuple(kept_groups))


class LayerScale(nn.Module):
    """One learned factor a channel (Touvron et al. 2021)."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def product(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """gamma * layer(x), by scaling the weights: they are small beside the tokens.

        Not so in fp16, which has no 1e-5 * 0.02: `rest` then scales, and keeps what it is given.
        """
        device, dtype = x.device.type, layer.weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if dtype == torch.float16:
            out: torch.Tensor = layer(x)
            return out
        weight, bias = layer.weight * self.gamma[:, None], layer.bias * self.gamma
        return linear(x, weight, bias)

    def rest(self, out: torch.Tensor) -> torch.Tensor:
        """What a `product` that came out in fp16 lacks."""
        return out * self.gamma if out.dtype == torch.float16 else out


class Attention(nn.Module):
    """Multi-head self-attention inside each sequence."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(
        self,
        x: torch.Tensor,
        around: tuple[nn.Module, LayerScale],
        groups: Groups,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(T, D) packed as `groups` -> (T, D), or the `wanted` (W,) tokens of it.

        `around`: the norm before and the scale after it.
        """
        norm, scale = around
        qkv = _again(self.qkv, norm, x)
        attended, width = [], x.shape[1]
        for part, (sequences, length) in zip(
            torch.split(qkv, [b * n for b, n in groups]), groups, strict=True
        ):
            heads = part.view(sequences, length, 3, self.heads, width // self.heads)
            attended.append(attention(heads).flatten(0, 1))

        def chosen(*parts: torch.Tensor) -> torch.Tensor:
            tokens = torch.cat(parts)
            return tokens if wanted is None else _rows(tokens, wanted)

        return scale.rest(_again(partial(scale.product, self.proj), chosen, *attended))


class Mlp(nn.Module):
    """Two linears with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: torch.Tensor, around: tuple[nn.Module, LayerScale]) -> torch.Tensor:
        """(T, D) -> (T, D); `around`: the norm before and the scale after it."""
        norm, scale = around
        hidden = _again(self.fc1, norm, x)
        return scale.rest(_again(partial(scale.product, self.fc2), _gelu, hidden))


class SwiGLU(nn.Module):
    """Gated linear unit (Shazeer 2020) with the width of its hidden layer as in DINOv2's ViT-g."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        gated = -(-int(hidden * 2 / 3) // 8) * 8  # up to a multiple of 8: 4,096 for ViT-g
        self.w12 = Linear(width, 2 * gated)
        self.w3 = Linear(gated, width)

    def forward(self, x: torch.Tensor, around: tuple[nn.Module, LayerScale]) -> torch.Tensor:
        """(T, D) -> (T, D); `around`: the norm before and the scale after it."""
        norm, scale = around
        hidden = _again(self.w12, norm, x)
        return scale.rest(_again(partial(scale.product, self.w3), _gated, hidden))


def _gelu(hidden: torch.Tensor) -> torch.Tensor:
    return functional.gelu(hidden)


def _gated(hidden: torch.Tensor) -> torch.Tensor:
    gate, value = hidden.chunk(2, dim=-1)
    return functional.silu(gate) * value


def _again(
    product: Callable[[torch.Tensor], torch.Tensor],
    before: Callable[..., torch.Tensor],
    *inputs: torch.Tensor,
) -> torch.Tensor:
    """product(before(*inputs)), of which backward computes `before` again, but no product.

    For what is cheap beside a product: norms, activations, copies. Without it a block keeps
    17 times its input for the backward pass, with it 10 times.
    """
    if not torch.is_grad_enabled():
        return product(before(*inputs))
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if torch.compiler.is_compiling():  # which would do the product again if it were within
        return product(again(before, *inputs))
    out: torch.Tensor = again(lambda *given: product(before(*given)), *inputs, context_fn=_contexts)
    return out


def _contexts() -> tuple[
    contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]
]:
    """Of a function that ends in a product: for its forward pass, and for doing it again."""
    return contextlib.nullcontext(), unwanted()


class Block(nn.Module):
    """Pre-norm block: x + ls1(attention(norm1(x))), then x + ls2(ffn(norm2(x)))."""

    def __init__(
        self, width: int, heads: int, hidden: int, ffn: Literal["mlp", "swiglu"], layerscale: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width, layerscale)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = (Mlp if ffn == "mlp" else SwiGLU)(width, hidden)
        self.ls2 = LayerScale(width, layerscale)

    def forward(
        self,
        x: torch.Tensor,
        groups: Groups,
        kept: tuple[Kept, Kept] | None = None,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(T, D) packed as `groups` -> (T, D); without `kept`, the `wanted` (W,) tokens of that.

        `kept` are the parts that attention and FFN are run on; None: on everything.
        """
        if kept is None:
            residual = self.attn(x, (self.norm1, self.ls1), groups, wanted)
            x = (x if wanted is None else _rows(x, wanted)) + residual
            out: torch.Tensor = x + self.mlp(x, (self.norm2, self.ls2))
            return out
        for_attention, for_ffn = kept
        part = _rows(x, for_attention.tokens)
        residual = self.attn(part, (self.norm1, self.ls1), for_attention.groups)
        x = _add(x, residual, for_attention)
        residual = self.mlp(_rows(x, for_ffn.tokens), (self.norm2, self.ls2))
        return _add(x, residual, for_ffn)


def _rows(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """x[places], whose gradient a GPU adds up without sorting the places first."""
    return x.index_select(0, places)


def _add(x: torch.Tensor, residual: torch.Tensor, kept: Kept) -> torch.Tensor:
    return x.index_add(0, kept.tokens, (residual * kept.scale).to(x.dtype))
