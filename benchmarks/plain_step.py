"""The same training step written plainly, as the official code does it: what ours is compared with.

Crop sizes one after the other, heads on a buffer padded to the upper bound of masked patches, whole
fp32 logits, Sinkhorn-Knopp that rewrites its matrix, a log-softmax for every pair of crops.
"""

import torch
from torch import nn
from torch.nn import functional

from pretrain.heads import ProjectionHead
from pretrain.layers import Attention, Block, Mlp
from pretrain.losses.koleo import koleo_loss
from pretrain.student_teacher import Batch, StudentTeacher
from pretrain.vit import ViT

TEMPERATURE = 0.1


def embedded(vit: nn.Module, crops: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 1 + N, D); for models without registers."""
    assert isinstance(vit, ViT)
    patches = vit.patch_embed.proj(crops)
    position = vit.positions(*patches.shape[2:])
    patches = patches.flatten(2).transpose(1, 2)
    if mask is not None:
        patches = torch.where(mask[..., None], vit.mask_token, patches)
    x = torch.cat([vit.cls_token.expand(len(crops), -1, -1), patches], dim=1)
    return torch.as_tensor(x + position)


def backbone(
    vit: nn.Module, crops: list[torch.Tensor], masks: list[torch.Tensor | None]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(class tokens, patches) of each size; every activation is kept for the backward pass."""
    assert isinstance(vit, ViT)
    out = []
    for x in (embedded(vit, crop, mask) for crop, mask in zip(crops, masks, strict=True)):
        for block in vit.blocks:
            assert isinstance(block, Block)
            assert isinstance(block.mlp, Mlp)
            x = x + attention(block.attn, block.norm1(x)) * block.ls1.gamma
            hidden = functional.gelu(linear(block.mlp.fc1, block.norm2(x)))
            x = x + linear(block.mlp.fc2, hidden) * block.ls2.gamma
        x = vit.norm(x)
        out.append((x[:, 0], x[:, 1:].flatten(0, 1)))
    return out


def linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """As torch does it, not as `pretrain.products`."""
    assert isinstance(layer, nn.Linear)
    return functional.linear(x, layer.weight, layer.bias)


def attention(layer: Attention, x: torch.Tensor) -> torch.Tensor:
    images, length, width = x.shape
    qkv = linear(layer.qkv, x).reshape(images, length, 3, layer.heads, width // layer.heads)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    mixed = functional.scaled_dot_product_attention(q, k, v)
    return linear(layer.proj, mixed.transpose(1, 2).reshape(images, length, width))


class WholeHead(nn.Module):
    """All logits of a head at once, its last layer by torch's own weight norm."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        assert isinstance(head, ProjectionHead)
        self.head = head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for layer in self.head.mlp:
            tokens = linear(layer, tokens) if isinstance(layer, nn.Linear) else layer(tokens)
        features = functional.normalize(tokens, dim=-1)
        last = self.head.last_layer
        return functional.linear(features, torch._weight_norm(last.weight_v, last.weight_g, 0))


def sinkhorn(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    q = torch.exp(logits.float() / temperature).t()
    prototypes, rows = q.shape
    q /= torch.sum(q)
    for _ in range(3):
        q /= torch.sum(q, dim=1, keepdim=True)
        q /= prototypes
        q /= torch.sum(q, dim=0, keepdim=True)
        q /= rows
    q *= rows
    return q.t()


def cross_entropy(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return -torch.sum(target * functional.log_softmax(logits / TEMPERATURE, dim=-1), dim=-1)


def padded(tokens: torch.Tensor, upper_bound: int) -> torch.Tensor:
    buffer = tokens.new_zeros(upper_bound, tokens.shape[1])
    buffer[: len(tokens)] = tokens
    return buffer


class PlainStep:
    """Works on the networks of a StudentTeacher with separate heads."""

    def __init__(self, model: StudentTeacher) -> None:
        self.model = model
        self.student = [WholeHead(model.student[f"{name}_head"]) for name in ("dino", "ibot")]
        self.teacher = [WholeHead(model.teacher[f"{name}_head"]) for name in ("dino", "ibot")]

    def loss(self, batch: Batch, temperature: float) -> torch.Tensor:
        masks = batch.masks
        count = len(masks.indices)
        with torch.no_grad():
            teacher, student = self.model.teacher["backbone"], self.model.student["backbone"]
            ((tokens, patches),) = backbone(teacher, [batch.global_crops], [None])
            patches = padded(patches[masks.indices], masks.upper_bound)
            dino = sinkhorn(self.teacher[0](torch.cat(tokens.chunk(2)[::-1])), temperature).chunk(2)
            ibot = sinkhorn(self.teacher[1](patches)[:count], temperature)
        crops, seen_by = [batch.global_crops, batch.local_crops], [masks.tokens, None]
        (classes, patches), (local, _) = backbone(student, crops, seen_by)
        patches = padded(patches[masks.indices], masks.upper_bound)
        by_patch = self.student[1](patches)[:count]
        logits = self.student[0](torch.cat([local, classes]))
        by_local, by_global = logits.split([len(local), len(classes)])
        views = by_local.chunk(len(by_local) // len(dino[0]))
        terms = 2 + 2 * len(views)
        loss = sum(cross_entropy(t, s).mean() for s in views for t in dino) / terms
        loss = loss + cross_entropy(torch.cat(dino), by_global).mean() * 2 / terms
        loss = loss + (cross_entropy(ibot, by_patch) * masks.weights).sum() / len(masks.tokens)
        spread = sum(koleo_loss(view) for view in classes.chunk(2))
        return torch.as_tensor(loss + 0.1 * spread)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        teacher = list(self.model.teacher.parameters())
        torch._foreach_mul_(teacher, momentum)  # type: ignore[arg-type]
        student = list(self.model.student.parameters())
        torch._foreach_add_(teacher, student, alpha=1 - momentum)  # type: ignore[arg-type]
