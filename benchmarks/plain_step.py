"""The same training step written plainly, as the official code does it: what ours is compared with.

Crop sizes one after the other, heads on a buffer padded to the upper bound of masked patches, whole
fp32 logits, Sinkhorn-Knopp that rewrites its matrix, a log-softmax for every pair of crops.
"""

import torch
from torch import nn
from torch.nn import functional

from pretrain.heads import ProjectionHead
from pretrain.losses.koleo import koleo_loss
from pretrain.student_teacher import Batch, StudentTeacher

TEMPERATURE = 0.1


class WholeHead(nn.Module):
    """All logits of a head at once, its last layer by torch's own weight norm."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        assert isinstance(head, ProjectionHead)
        self.head = head

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        features = functional.normalize(self.head.mlp(tokens), dim=-1)
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
            seen = self.model.teacher["backbone"]([batch.global_crops])[0]
            classes = torch.cat(seen.cls.chunk(2)[::-1])
            patches = padded(seen.patches.flatten(0, 1)[masks.indices], masks.upper_bound)
            dino = sinkhorn(self.teacher[0](classes), temperature).chunk(2)
            ibot = sinkhorn(self.teacher[1](patches)[:count], temperature)
        backbone = self.model.student["backbone"]
        seen = backbone([batch.global_crops], [masks.tokens])[0]
        local = backbone([batch.local_crops])[0]
        patches = padded(seen.patches.flatten(0, 1)[masks.indices], masks.upper_bound)
        by_patch = self.student[1](patches)[:count]
        logits = self.student[0](torch.cat([local.cls, seen.cls]))
        by_local, by_global = logits.split([len(local.cls), len(seen.cls)])
        views = by_local.chunk(len(by_local) // len(dino[0]))
        terms = 2 + 2 * len(views)
        loss = sum(cross_entropy(t, s).mean() for s in views for t in dino) / terms
        loss = loss + cross_entropy(torch.cat(dino), by_global).mean() * 2 / terms
        loss = loss + (cross_entropy(ibot, by_patch) * masks.weights).sum() / len(masks.tokens)
        spread = sum(koleo_loss(view) for view in seen.cls.chunk(2))
        return torch.as_tensor(loss + 0.1 * spread)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        teacher = list(self.model.teacher.parameters())
        torch._foreach_mul_(teacher, momentum)  # type: ignore[arg-type]
        student = list(self.model.student.parameters())
        torch._foreach_add_(teacher, student, alpha=1 - momentum)  # type: ignore[arg-type]
