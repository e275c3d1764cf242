"""The blocks of a ViT on a GPU in half precision: timm's, with half of the passes over memory.

What a block adds to its input is the result of a product, whose kernel can do the addition too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, pad, scaled_dot_product_attention

ALIGNED = 8  # numbers of 16 bits that a product reads at once


@torch.library.custom_op("lvd::add_product", mutates_args=("rows",))
def add_product(rows: Tensor, x: Tensor, weight: Tensor) -> None:
    """rows (M, D) += x (M, I) weight (D, I)^T in one kernel: a compiler would copy the rows."""
    rows.addmm_(x, weight.t())


class AddingBlocks(nn.Module):
    """Blocks in a row, (B, N, D) -> (B, N, D), whose products add to the rows of x themselves.

    Such a product has no room for a bias: what they come to is added where x is read, and in the
    end. LayerScale is a part of the weights. GELU is a part of the product before it, in its tanh
    form (arXiv 1606.08415, section 2), up to 5e-4 from the exact one.
    """

    def __init__(self, blocks: Any) -> None:
        super().__init__()
        shift = torch.zeros_like(blocks[0].norm1.weight, dtype=torch.float32)
        self.blocks = nn.ModuleList()
        for block in blocks:
            adding = AddingBlock(block, shift)
            self.blocks.append(adding)
            shift = adding.after
        self.shift = nn.Buffer(shift)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).clone()
        for block in self.blocks:
            block(rows, x.shape[1])
        return (rows + self.shift).to(x.dtype).view(x.shape)


class AddingBlock(nn.Module):
    """Adds to rows (B N, D) what a block of timm's adds. The rows lack `before` (D,) as it begins,
    `between` in its midst, and `after` in the end."""

    def __init__(self, block: Any, before: Tensor) -> None:
        super().__init__()
        attention, mlp = block.attn, block.mlp
        self.heads, self.scale = attention.num_heads, attention.scale
        self.norm1, self.qkv = block.norm1, attention.qkv
        self.norm2, self.fc1 = block.norm2, mlp.fc1
        proj, proj_bias = _scaled(attention.proj, block.ls1)
        fc2, fc2_bias = _scaled(mlp.fc2, block.ls2)
        self.proj, self.fc2 = nn.Parameter(proj), nn.Parameter(fc2)
        self.before, self.between = nn.Buffer(before), nn.Buffer(before + proj_bias)
        self.after = before + proj_bias + fc2_bias

    def forward(self, rows: Tensor, tokens: int) -> None:
        qkv = self.qkv(_normed(rows, self.before, self.norm1))
        parts = qkv.view(-1, tokens, 3, self.heads, qkv.shape[1] // 3 // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value, scale=self.scale)
        add_product(rows, mixed.transpose(1, 2).reshape(len(rows), -1), self.proj)
        add_product(rows, _gelu_of(self.fc1, _normed(rows, self.between, self.norm2)), self.fc2)


class PatchProduct(nn.Module):
    """A convolution of patches that don't overlap, (B, 3, S, S) -> (B, D, s, s), as one product:
    cuDNN's kernels for so few channels take ten times as long."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.side = convolution.kernel_size[0]
        weight = convolution.weight.detach().flatten(1)
        self.padding = -weight.shape[1] % ALIGNED
        self.weight = nn.Parameter(pad(weight, (0, self.padding)))
        self.bias = convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        images, channels, height, width = x.shape
        down, across = height // self.side, width // self.side
        patches = x.reshape(images, channels, down, self.side, across, self.side)
        rows = patches.permute(0, 2, 4, 1, 3, 5).reshape(images * down * across, -1)
        found = linear(pad(rows, (0, self.padding)), self.weight, self.bias)
        return found.view(images, down, across, -1).permute(0, 3, 1, 2)


class FusedMlp(nn.Module):
    """The two layers of a block that is none of those, with the same GELU."""

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.fc1, self.fc2 = first, second

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) -> (…, D)."""
        whole: Tensor = self.fc2(_gelu_of(self.fc1, x.reshape(-1, x.shape[-1])))
        return whole.view(x.shape)


def recorded(compute: Callable[[Tensor], Tensor], given: Tensor) -> Callable[[Tensor], Tensor]:
    """The same for inputs like `given`, as a CUDA graph: its kernels follow each other without the
    processor. A result is overwritten by the next one."""
    if not given.is_cuda:
        return compute
    with torch.inference_mode():
        compute(given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = compute(given)

    def replayed(x: Tensor) -> Tensor:
        given.copy_(x)
        graph.replay()
        return found

    return replayed


def multiply_patches(net: nn.Module) -> torch.memory_format:
    """Puts, in place, a `PatchProduct` where a ViT convolves; returns the layout that inputs and
    weights should have, by what convolutions are left."""
    patches: Any = getattr(getattr(net, "patch_embed", None), "proj", None)
    if type(patches) is nn.Conv2d and _apart(patches):
        embedding: Any = net.patch_embed
        embedding.proj = PatchProduct(patches)
    if not any(isinstance(module, nn.Conv2d) for module in net.modules()):
        return torch.contiguous_format
    net.to(memory_format=torch.channels_last)
    return torch.channels_last


def suit_gpu(net: nn.Module) -> None:
    """Puts, in place, `AddingBlocks` and a `FusedMlp` where a timm model has plain parts."""
    from timm.layers.mlp import Mlp  # not at the top: see `load_semantic`
    from timm.models.vision_transformer import VisionTransformer

    blocks: Any = getattr(net, "blocks", None)
    if type(net) is VisionTransformer and all(_plain(block) for block in blocks):
        net.blocks = AddingBlocks(blocks)  # type: ignore[assignment]
    for module in net.modules():
        for name, part in module.named_children():
            mlp: Any = part if type(part) is Mlp else None
            if mlp and type(mlp.act) is nn.GELU and isinstance(mlp.norm, nn.Identity):
                setattr(module, name, FusedMlp(mlp.fc1, mlp.fc2))


def _apart(convolution: nn.Conv2d) -> bool:
    """Whether it takes square patches that neither overlap nor leave gaps."""
    sides = {*convolution.kernel_size, *convolution.stride}
    plain = {*convolution.padding} == {0} and {*convolution.dilation, convolution.groups} == {1}
    return len(sides) == 1 and plain


def _plain(block: Any) -> bool:
    from timm.models import vision_transformer

    vit: Any = vision_transformer
    kinds = (type(block), type(getattr(block, "attn", None)), type(getattr(block, "mlp", None)))
    if kinds != (vit.Block, vit.Attention, vit.Mlp):
        return False
    attention, mlp = block.attn, block.mlp
    optional = (
        attention.q_norm,
        attention.k_norm,
        getattr(attention, "norm", nn.Identity()),
        mlp.norm,
    )
    return (
        all(isinstance(part, nn.Identity) for part in optional)
        and getattr(attention, "gate", None) is None
        and all(isinstance(norm, nn.LayerNorm) for norm in (block.norm1, block.norm2))
        and all(isinstance(ls, nn.Identity | vit.LayerScale) for ls in (block.ls1, block.ls2))
        and type(mlp.act) is nn.GELU
        and mlp.fc1.bias is not None
    )


def _gelu_of(layer: nn.Linear, rows: Tensor) -> Tensor:
    """GELU of a product, in its tanh form, by the product's own kernel."""
    return torch._addmm_activation(layer.bias, rows, layer.weight.t(), use_gelu=True)


def _scaled(layer: nn.Linear, scale: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight (D, I) and fp32 bias (D,) of a product with a LayerScale after it, or none."""
    weight = layer.weight.detach().float()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().float()
    gamma: Any = getattr(scale, "gamma", None)
    if gamma is not None:
        weight, bias = weight * gamma.float()[:, None], bias * gamma.float()
    return weight.to(layer.weight.dtype), bias


def _normed(rows: Tensor, shift: Tensor, norm: Any) -> Tensor:
    """Of rows + shift, in fp32 until it is done."""
    weight, bias = (None if one is None else one.float() for one in (norm.weight, norm.bias))
    return layer_norm(rows + shift, norm.normalized_shape, weight, bias, norm.eps).to(rows.dtype)
