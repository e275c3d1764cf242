"""The objective of DINOv2: a student, the teacher that follows it, and one step's losses."""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import nn

from pretrain.distributed import shards_of
from pretrain.heads import HeadConfig, ProjectionHead
from pretrain.losses.centering import ALONE, AllReduce, SoftmaxCenter, sinkhorn_knopp
from pretrain.losses.cross_entropy import Term, soft_cross_entropy
from pretrain.losses.dino import dino_terms
from pretrain.losses.ibot import ibot_term
from pretrain.losses.koleo import koleo_loss
from pretrain.masking import Masks
from pretrain.ranges import Count, NotNegative, Positive, Share
from pretrain.vit import Tokens, ViT, ViTConfig


@dataclass(frozen=True)
class ObjectiveConfig:
    """Losses and how they are balanced; defaults: DINOv2's long recipe."""

    dino_head: HeadConfig
    ibot_head: HeadConfig | None = None  # None: iBOT shares the head of DINO
    centering: Literal["sinkhorn_knopp", "softmax"] = "sinkhorn_knopp"
    sinkhorn_iterations: Count = 3
    center_momentum: Share = 0.9
    student_temperature: Positive = 0.1
    dino_weight: NotNegative = 1.0
    ibot_weight: NotNegative = 1.0
    koleo_weight: NotNegative = 0.1


class Batch(NamedTuple):
    """Crops of B images. Views lie one after the other: first that of all images, then the next."""

    global_crops: torch.Tensor  # (2B, 3, H, W)
    local_crops: torch.Tensor  # (L B, 3, h, w)
    masks: Masks  # of the global crops


class Targets(NamedTuple):
    """What the teacher says; rows sum to 1."""

    dino: torch.Tensor  # (2B, K) fp32; row i is for the student's global crop i: the other view
    ibot: torch.Tensor  # (M, K) fp32, the masked patches


class StepLosses(NamedTuple):
    """`total` is to be propagated back; the rest is detached."""

    total: torch.Tensor  # scalar
    values: dict[str, torch.Tensor]  # unweighted: total is their sum times the weights (none of 0)


class StudentTeacher(nn.Module):
    """Both networks as `backbone`, `dino_head` and, unless it is shared, `ibot_head`.

    In a distillation a `frozen` teacher says the targets, and `teacher` is only the student's
    average: the model that comes out in both cases.
    """

    def __init__(
        self,
        vit: ViTConfig,
        objective: ObjectiveConfig,
        reduce: AllReduce = ALONE,
        activation_checkpointing: bool = False,
        frozen: nn.ModuleDict | None = None,
    ) -> None:
        """The teacher starts as a copy of the student; it never drops paths nor learns."""
        super().__init__()
        self.objective, self.reduce = objective, reduce
        self.student = _networks(vit, objective, activation_checkpointing)
        self.teacher = _networks(vit, objective, False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False).eval()
        self.frozen = frozen
        heads = {"dino": objective.dino_head, "ibot": objective.ibot_head or objective.dino_head}
        self.centers = nn.ModuleDict()
        if objective.centering == "softmax":
            for name, head in heads.items():
                self.centers[name] = SoftmaxCenter(head.prototypes, objective.center_momentum)

    def train(self, mode: bool = True) -> "StudentTeacher":
        super().train(mode)
        self.teacher.eval()
        if self.frozen is not None:
            self.frozen.eval()
        return self

    def forward(self, batch: Batch, teacher_temperature: float) -> StepLosses:
        """One step's losses; call `total.backward()` and, after the optimizer, `update_teacher`."""
        config, masks = self.objective, batch.masks
        dino_targets, ibot_targets = self.targets(batch, teacher_temperature)
        seen, local = self.student["backbone"](
            [batch.global_crops, batch.local_crops], [masks.tokens, None], masks.indices
        )
        classes = torch.cat([seen.cls, local.cls])
        dino = dino_terms(dino_targets, len(local.cls), config.dino_weight)
        ibot = ibot_term(ibot_targets, masks.weights, len(seen.cls), config.ibot_weight)
        if "ibot_head" in self.student:
            ibot_loss, patch = self._cross_entropy("ibot_head", seen.patches, (ibot,))
            del ibot, ibot_targets  # as large as the other head's prototypes and gradients
            dino_loss, each = self._cross_entropy("dino_head", classes, dino)
            cross_entropy, each = dino_loss + ibot_loss, torch.cat([each, patch])
        else:
            tokens = torch.cat([classes, seen.patches])
            cross_entropy, each = self._cross_entropy("dino_head", tokens, (*dino, ibot))
        # Each view apart: two views of one image are not to be pushed from each other.
        koleo = torch.stack([koleo_loss(view) for view in seen.cls.chunk(2)]).sum()
        total = cross_entropy + config.koleo_weight * koleo
        weights = (config.dino_weight, config.dino_weight, config.ibot_weight)
        weighted = zip(("dino_global", "dino_local", "ibot"), each.unbind(), weights, strict=True)
        values = {name: value / weight for name, value, weight in weighted if weight}
        values["koleo"] = koleo.detach()
        return StepLosses(total, values | _diagnostics(dino_targets))

    @torch.no_grad()
    def targets(self, batch: Batch, temperature: float) -> Targets:
        """What the teacher sees in the whole global crops, centred."""
        seen: Tokens
        teacher = self.teacher if self.frozen is None else self.frozen
        (seen,) = teacher["backbone"]([batch.global_crops], patches=batch.masks.indices)
        first, second = seen.cls.chunk(2)
        classes = torch.cat([second, first])  # so that each view meets the other one
        patches = seen.patches
        if "ibot_head" in teacher:
            dino, ibot = teacher["dino_head"](classes), teacher["ibot_head"](patches)
        else:
            both = teacher["dino_head"](torch.cat([classes, patches]))
            dino, ibot = both.split([len(classes), len(patches)])
        return Targets(
            self._center("dino", dino, temperature), self._center("ibot", ibot, temperature)
        )

    def _center(self, name: str, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        if self.objective.centering == "softmax":
            targets: torch.Tensor = self.centers[name](logits, temperature, self.reduce)
            return targets
        iterations = self.objective.sinkhorn_iterations
        return sinkhorn_knopp(logits, temperature, iterations, self.reduce)

    def _cross_entropy(
        self, head: str, tokens: torch.Tensor, terms: tuple[Term, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        criterion = partial(
            soft_cross_entropy, terms=terms, temperature=self.objective.student_temperature
        )
        losses: tuple[torch.Tensor, torch.Tensor] = self.student[head](tokens, criterion)
        return losses

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student, also after a skipped step."""
        teacher = shards_of(list(self.teacher.parameters()))
        student = shards_of(list(self.student.parameters()))
        torch._foreach_lerp_(teacher, student, 1 - momentum)


def clip_gradients(student: nn.ModuleDict, most: float) -> dict[str, torch.Tensor]:
    """Clips the gradients of each network apart, to the norm `most`; returns the norms before.

    After the scaler's unscale_. A "frozen" last layer has a learning rate of 0, but its gradient
    counts here, as in the official code.
    """
    return {
        name: nn.utils.clip_grad_norm_(network.parameters(), most)
        for name, network in student.items()
    }


def _networks(
    vit: ViTConfig, objective: ObjectiveConfig, activation_checkpointing: bool
) -> nn.ModuleDict:
    networks: dict[str, nn.Module] = {
        "backbone": ViT(vit, activation_checkpointing),
        "dino_head": ProjectionHead(vit.width, objective.dino_head),
    }
    if objective.ibot_head is not None:
        networks["ibot_head"] = ProjectionHead(vit.width, objective.ibot_head)
    return nn.ModuleDict(networks)


def _diagnostics(targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of (2B, K) targets of the class tokens: collapse shows in both, long before in the loss."""
    return {
        "teacher_entropy": torch.special.entr(targets).sum(dim=1).mean(),  # nats
        "prototype_usage": _distinct(targets.argmax(dim=1)) / len(targets),
    }


def _distinct(numbers: torch.Tensor) -> torch.Tensor:
    """How many different values, without a shape that depends on them."""
    ordered = numbers.sort().values
    return 1 + (ordered[1:] != ordered[:-1]).sum()
