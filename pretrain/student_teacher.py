"""The objective of DINOv2: a student, the teacher that follows it, and one step's losses."""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import nn

from pretrain.distributed import shards_of
from pretrain.heads import HeadConfig, ProjectionHead
from pretrain.losses.centering import (
    ALONE,
    AllReduce,
    SoftmaxCenter,
    Targets,
    sinkhorn_knopp,
)
from pretrain.losses.cross_entropy import Term, soft_cross_entropy
from pretrain.losses.dino import dino_terms
from pretrain.losses.ibot import ibot_term
from pretrain.losses.koleo import koleo_loss
from pretrain.masking import Masks
from pretrain.ranges import Count, NotNegative, Positive, Share
from pretrain.scores import Scores
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
        config, taught = self.objective, self._taught(batch)
        seen, local = self.student["backbone"](
            [batch.global_crops, batch.local_crops], [batch.masks.tokens, None], batch.masks.indices
        )
        images = len(seen.cls) // 2
        local_by_image = local.cls.unflatten(0, (len(local.cls) // images, images)).transpose(0, 1)
        own = {"dino": torch.cat([seen.cls, local_by_image.flatten(0, 1)]), "ibot": seen.patches}
        # Each view apart: two views of one image are not to be pushed from each other.
        koleo = torch.stack([koleo_loss(view) for view in seen.cls.chunk(2)]).sum()
        total, values = config.koleo_weight * koleo, {"koleo": koleo.detach()}
        weights = {
            "dino_global": config.dino_weight,
            "dino_local": config.dino_weight,
            "ibot": config.ibot_weight,
        }
        for head, kinds in self._heads().items():
            targets = self._targets({kind: taught[kind] for kind in kinds}, teacher_temperature)
            terms: dict[str, Term] = {}
            for kind in kinds:
                terms |= self._terms(kind, targets[kind], batch)
            tokens = torch.cat([own[kind] for kind in kinds])
            loss, each = self._cross_entropy(head, tokens, tuple(terms.values()))
            total = total + loss
            sums = zip(terms, each.unbind(), strict=True)
            values |= {name: value / weights[name] for name, value in sums if weights[name]}
            if "dino" in kinds:
                values |= _diagnostics(targets["dino"])
            del targets, terms  # with the teacher's prototypes, before the next head's are made
        return StepLosses(total, values)

    def targets(self, batch: Batch, temperature: float) -> dict[str, Targets]:
        """What the teacher says, of `dino` (2B rows) and `ibot` (M rows, the masked patches).

        Row i of `dino` is for the student's global crop i: the other view of its image.
        """
        return self._targets(self._taught(batch), temperature)

    def _heads(self) -> dict[str, tuple[str, ...]]:
        """What the tokens that a head sees are compared for."""
        if "ibot_head" in self.student:
            return {"ibot_head": ("ibot",), "dino_head": ("dino",)}
        return {"dino_head": ("dino", "ibot")}

    def _terms(self, kind: str, targets: Targets, batch: Batch) -> dict[str, Term]:
        """The losses of a kind, by name."""
        config, crops = self.objective, len(batch.global_crops)
        if kind == "ibot":
            return {"ibot": ibot_term(targets, batch.masks.weights, crops, config.ibot_weight)}
        both = dino_terms(targets, len(batch.local_crops), config.dino_weight)
        return dict(zip(("dino_global", "dino_local"), both, strict=True))

    @torch.no_grad()
    def _taught(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The teacher's tokens of whole global crops by what they are compared for."""
        seen: Tokens
        (seen,) = self._teacher["backbone"]([batch.global_crops], patches=batch.masks.indices)
        first, second = seen.cls.chunk(2)  # each view meets the other one
        return {"dino": torch.cat([second, first]), "ibot": seen.patches}

    @torch.no_grad()
    def _targets(self, taught: dict[str, torch.Tensor], temperature: float) -> dict[str, Targets]:
        teacher = self._teacher
        heads = {kind: f"{kind}_head" for kind in taught if f"{kind}_head" in teacher}
        if len(heads) == len(taught):
            scores = [teacher[heads[kind]](tokens) for kind, tokens in taught.items()]
        else:  # it has one for both
            tokens = list(taught.values())
            scores = teacher["dino_head"](torch.cat(tokens)).split([len(part) for part in tokens])
        return {
            kind: self._center(kind, one, temperature)
            for kind, one in zip(taught, scores, strict=True)
        }

    @property
    def _teacher(self) -> nn.ModuleDict:
        return self.teacher if self.frozen is None else self.frozen

    def _center(self, kind: str, scores: Scores, temperature: float) -> Targets:
        if self.objective.centering == "softmax":
            targets: Targets = self.centers[kind](scores, temperature, self.reduce)
            return targets
        iterations = self.objective.sinkhorn_iterations
        return sinkhorn_knopp(scores, temperature, iterations, self.reduce)

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


@torch.no_grad()
def _diagnostics(targets: Targets) -> dict[str, torch.Tensor]:
    """Of those of the class tokens: collapse shows in both, long before in the loss."""
    entropies, likeliest = [], []
    for start, stop in targets.scores.chunks():
        rows = targets.rows(start, stop)
        likeliest.append(rows.argmax(dim=1))
        entropies.append(torch.special.entr(rows).sum(dim=1))
    return {
        "teacher_entropy": torch.cat(entropies).mean(),  # nats
        "prototype_usage": _distinct(torch.cat(likeliest)) / len(targets),
    }


def _distinct(numbers: torch.Tensor) -> torch.Tensor:
    """How many different values, without a shape that depends on them."""
    ordered = numbers.sort().values
    return 1 + (ordered[1:] != ordered[:-1]).sum()
