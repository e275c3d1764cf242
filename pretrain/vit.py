"""Vision transformer of DINOv2: several crop sizes in one pass, masked patches, registers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pretrain.layers import NORM_EPS, Block, Groups, draw_kept
from pretrain.products import linear
from pretrain.ranges import Count, CountOrZero, NotNegative, Positive, ShareBelowOne


@dataclass(frozen=True)
class ViTConfig:
    """Architecture. Defaults are ViT-S/14 as released; `VIT_SIZES` has the other widths."""

    patch_size: Count = 14  # pixels
    width: Count = 384
    depth: Count = 12
    heads: Count = 6
    ffn: Literal["mlp", "swiglu"] = "mlp"
    ffn_ratio: Positive = 4.0  # hidden / width; SwiGLU takes two thirds of it
    layerscale: Positive = 1e-5
    registers: CountOrZero = 0
    drop_path: ShareBelowOne = 0.0  # the same in all blocks
    image_size: Count = 518  # pixels; its grid is the position embedding's, others are interpolated
    # Released models without registers: 0.1 and False; with registers, and in timm: 0 and True.
    interpolate_offset: NotNegative = 0.1
    interpolate_antialias: bool = False

    @property
    def grid(self) -> int:
        """Side of the position embedding's grid, in patches."""
        return self.image_size // self.patch_size


VIT_SIZES: dict[str, dict[str, Any]] = {  # arguments of ViTConfig
    "small": {"width": 384, "depth": 12, "heads": 6},
    "base": {"width": 768, "depth": 12, "heads": 12},
    "large": {"width": 1024, "depth": 24, "heads": 16},
    "giant": {"width": 1536, "depth": 40, "heads": 24, "ffn": "swiglu"},
}


class Tokens(NamedTuple):
    """Tokens of one batch of crops after the final norm; empty where they weren't asked for."""

    cls: torch.Tensor  # (B, D)
    registers: torch.Tensor  # (B, R, D)
    patches: torch.Tensor  # (B, N, D), row by row; (M, D) where M were asked for


class PatchEmbed(nn.Module):
    """Patches -> tokens: the convolution of the official code as one product for all crops."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, crops: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each (B, 3, H, W) -> (B, H / p * W / p, D)."""
        p = self.patch_size
        shapes = [(c.shape[0], c.shape[2] // p, c.shape[3] // p) for c in crops]
        rows = [
            crop.view(b, 3, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(b * h * w, 3 * p * p)
            for crop, (b, h, w) in zip(crops, shapes, strict=True)
        ]
        tokens = linear(torch.cat(rows), self.proj.weight.flatten(1), self.proj.bias)
        parts = torch.split(tokens, [b * h * w for b, h, w in shapes])
        width = tokens.shape[1]
        return [t.view(b, h * w, width) for t, (b, h, w) in zip(parts, shapes, strict=True)]


class ViT(nn.Module):
    """DINOv2's backbone; parameters have the official names."""

    def __init__(self, config: ViTConfig, activation_checkpointing: bool = False) -> None:
        """With `activation_checkpointing` a block keeps only its input for the backward pass."""
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        width = config.width
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.grid**2, width))
        if config.registers:
            self.register_tokens = nn.Parameter(torch.empty(1, config.registers, width))
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.patch_embed = PatchEmbed(config.patch_size, width)
        hidden = int(width * config.ffn_ratio)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, hidden, config.ffn, config.layerscale)
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.init_weights()

    def init_weights(self) -> None:
        """The official initialisation; the patch embedding keeps torch's own."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.zeros_(self.mask_token)
        if self.config.registers:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        crops: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor | None] | None = None,
        patches: torch.Tensor | None = None,
    ) -> list[Tokens]:
        """Crops of several sizes, each (B, 3, H, W), in one pass -> the tokens of each.

        H and W are multiples of the patch size. masks, where given: (B, N) bool, true where the
        mask token stands for the patch. patches (M,): those of the first crops that are asked for,
        as places among its B N; then its `patches` are (M, D), nobody's else are given, and the
        last block leaves out the rest. Drop path draws from torch's global generator, in training
        mode only.
        """
        x, groups = self._embed(crops, masks or [None] * len(crops))
        *blocks, last = self.blocks
        for block in blocks:
            x = self._run(block, x, groups)
        if patches is None:
            return self._unpack(self.norm(self._run(last, x, groups)), groups)
        wanted, counts = self._places(groups, patches)
        parts = torch.split(self.norm(self._run(last, x, groups, wanted)), counts)
        nothing = parts[0][:0]
        first = Tokens(parts[0], nothing, parts[1])
        return [first, *(Tokens(part, nothing, nothing) for part in parts[2:])]

    def _places(self, groups: Groups, patches: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Places among the packed tokens: class tokens of the first crops, `patches`, the rest's.

        Also how many of each.
        """
        start, device, (_, length) = 0, patches.device, groups[0]
        before = 1 + self.config.registers
        image, patch = patches // (length - before), patches % (length - before)
        places = []
        for sequences, step in groups:
            stop = start + sequences * step
            places.append(torch.arange(start, stop, step, device=device))
            start = stop
        places.insert(1, image * length + before + patch)
        return torch.cat(places), [len(part) for part in places]

    def intermediate_layers(self, images: torch.Tensor, last: int) -> list[Tokens]:
        """(B, 3, H, W) -> the tokens after each of the `last` blocks, all through the norm."""
        x, groups = self._embed([images], [None])
        layers = []
        for number, block in enumerate(self.blocks):
            x = self._run(block, x, groups)
            if number >= len(self.blocks) - last:
                layers += self._unpack(self.norm(x), groups)
        return layers

    def _run(
        self, block: nn.Module, x: torch.Tensor, groups: Groups, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Draws happen here: a block is then a pure function, to compile and to run again."""
        kept, drop_path = None, self.config.drop_path
        if self.training and drop_path > 0:
            kept = tuple(draw_kept(groups, drop_path, x.device) for _ in ("attention", "ffn"))
        # Else everything is worked out in any case, by a block that is compiled as the others are.
        inside = wanted if kept is None else None
        out: torch.Tensor
        if self.activation_checkpointing and torch.is_grad_enabled():
            out = checkpoint(
                block, x, groups, kept, inside, use_reentrant=False, preserve_rng_state=False
            )
        else:
            out = block(x, groups, kept, inside)
        return out if kept is None or wanted is None else out.index_select(0, wanted)

    def _embed(
        self, crops: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, Groups]:
        """Packed tokens (T, D): of each sequence class, registers, patches."""
        packed, groups = [], []
        for crop, patches, mask in zip(crops, self.patch_embed(crops), masks, strict=True):
            if mask is not None:  # before the position embedding: a masked patch knows its place
                patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
            p = self.config.patch_size
            position = self.positions(crop.shape[2] // p, crop.shape[3] // p)
            first = [self.cls_token + position[:, :1]]
            if self.config.registers:  # they have no position
                first.append(self.register_tokens)
            patches = patches + position[:, 1:]
            tokens = [t.expand(len(crop), -1, -1).to(patches.dtype) for t in first]
            sequence = torch.cat([*tokens, patches], dim=1)
            packed.append(sequence.flatten(0, 1))
            groups.append((len(crop), sequence.shape[1]))
        return torch.cat(packed), tuple(groups)

    def positions(self, height: int, width: int) -> torch.Tensor:
        """(1, 1 + height * width, D) position embedding of a grid of patches."""
        grid, embedding = self.config.grid, self.pos_embed
        if (height, width) == (grid, grid):
            return embedding
        resized = resize_positions(
            embedding[:, 1:],
            (height, width),
            self.config.interpolate_offset,
            self.config.interpolate_antialias,
        )
        return torch.cat([embedding[:, :1], resized], dim=1)

    def _unpack(self, x: torch.Tensor, groups: Groups) -> list[Tokens]:
        tokens = []
        parts = torch.split(x, [sequences * length for sequences, length in groups])
        for part, (sequences, length) in zip(parts, groups, strict=True):
            whole, first = part.view(sequences, length, x.shape[1]), 1 + self.config.registers
            tokens.append(Tokens(whole[:, 0], whole[:, 1:first], whole[:, first:]))
        return tokens


def resize_positions(
    embedding: torch.Tensor, size: tuple[int, int], offset: float, antialias: bool
) -> torch.Tensor:
    """(1, M * M, D) -> (1, height * width, D), bicubic, in fp32.

    With an offset the sampling scale is (side + offset) / M rather than side / M: a work-around
    of DINO against rounding, which the released weights were trained with.
    """
    side = round(embedding.shape[1] ** 0.5)
    image = embedding.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = tuple((s + offset) / side for s in size)
    image = functional.interpolate(
        image,
        None if offset else size,
        scale if offset else None,
        mode="bicubic",
        antialias=antialias,
    )
    return image.permute(0, 2, 3, 1).flatten(1, 2).to(embedding.dtype)


def compile_blocks(vit: ViT, backend: str | Callable[..., Any] = "inductor") -> None:
    """torch.compile on every block, in place: parameter names stay; before `fully_shard`."""
    for block in vit.blocks:
        block.compile(backend=backend)
