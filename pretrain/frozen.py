"""The frozen teacher of a distillation: a run of ours with its heads, or any timm model.

A foreign model has no heads, so its features are compared with those of training images: how near
each of them is takes the place of a prototype's score, as in SEED (Fang et al., arXiv 2101.04731).
"""

import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional

from pretrain import distributed, weights
from pretrain.collate import IMAGENET_MEAN, IMAGENET_STD
from pretrain.config import Config, DistillConfig
from pretrain.errors import UserError
from pretrain.export import load_run
from pretrain.scores import Scores, product_dtype
from pretrain.vit import Tokens

TRAINING = ("module.", "teacher.", "student.", "backbone.")  # prefixes in its checkpoints
CLASSIFIERS = ("head.", "head_dist.", "fc.", "classifier.", "fc_norm.")


def load_teacher(config: Config) -> nn.ModuleDict:
    """The teacher of `config.distill`, frozen: `backbone`, `dino_head` and maybe `ibot_head`.

    Anchors are heads that `fill_anchors` has still to fill. Errors: UserError.
    """
    distill = config.distill
    assert distill is not None
    if Path(distill.teacher).is_dir():
        networks = _of_run(config, Path(distill.teacher))
    else:
        networks = _of_timm(config, distill)
    return networks.requires_grad_(False).eval()


class Resized(nn.Module):
    """A backbone that sees crops at its own patch size: as many patches as the student has."""

    def __init__(self, backbone: nn.Module, patch_size: int, student_patch_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.patch_size, self.student_patch_size = patch_size, student_patch_size

    def forward(
        self,
        crops: Sequence[torch.Tensor],
        patches: torch.Tensor | None = None,
    ) -> list[Tokens]:
        """One (B, 3, H, W) -> its tokens; `patches` as in `ViT.forward`."""
        (images,) = crops
        if self.patch_size != self.student_patch_size:
            size = [side // self.student_patch_size * self.patch_size for side in images.shape[2:]]
            images = functional.interpolate(images.float(), size, mode="bicubic", antialias=True)
        tokens: list[Tokens] = self.backbone([images], patches=patches)
        return tokens


class TimmBackbone(nn.Module):
    """A timm model called as our ViT is: a class token and a grid of patches or of pixels.

    Without a class token the mean of the grid stands for it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        given: Any = model.pretrained_cfg  # its own normalisation, from ImageNet's
        mean, std = (torch.tensor(given[name]) for name in ("mean", "std"))
        scale = torch.tensor(IMAGENET_STD) / std
        shift = (torch.tensor(IMAGENET_MEAN) - mean) / std
        self.scale = nn.Parameter(scale.view(3, 1, 1))
        self.shift = nn.Parameter(shift.view(3, 1, 1))

    def forward(
        self,
        crops: Sequence[torch.Tensor],
        patches: torch.Tensor | None = None,
    ) -> list[Tokens]:
        """As `Resized.forward`."""
        (images,) = crops
        found: torch.Tensor = self.model.forward_features(  # type: ignore[operator]
            images * self.scale + self.shift
        )
        if found.ndim == 4:  # a convolutional network's, or a Swin's, whose channels are last
            channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            found = found.flatten(1, 2) if channels_last else found.flatten(2).transpose(1, 2)
        first = int(getattr(self.model, "num_prefix_tokens", 0))
        grid = found[:, first:]
        has_class = first and getattr(self.model, "cls_token", None) is not None
        cls = found[:, 0] if has_class else grid.mean(dim=1)
        if patches is not None:
            return [Tokens(cls, cls[:0], grid.flatten(0, 1)[patches])]
        return [Tokens(cls, cls[:0], grid)]


class Anchors(nn.Module):
    """Scores of a feature: its cosines to K features of training images, all less their mean."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(width))
        self.features = nn.Parameter(torch.zeros(count, width))  # unit norm

    def fill(self, rows: torch.Tensor) -> None:
        """(at least K, D) features of training images."""
        rows = rows[: len(self.features)].float()
        self.mean.copy_(rows.mean(dim=0))
        self.features.copy_(functional.normalize(rows - self.mean, dim=1))

    def forward(self, tokens: torch.Tensor) -> Scores:
        """(N, D) -> (N, K), of a copy: sharded features are whole only in here."""
        rows = functional.normalize(tokens.float() - self.mean, dim=1)
        return Scores(rows, self.features.to(product_dtype(self.features), copy=True))


@torch.no_grad()
def fill_anchors(
    networks: nn.ModuleDict, global_crops: Iterable[torch.Tensor], rng: torch.Generator
) -> None:
    """Takes features of each rank's (2B, 3, H, W) crops until there are as many as anchors.

    All ranks call it, with crops of their own and of one shape. A batch gives its class tokens and
    equally many patches, drawn at random.
    """
    dino, ibot = networks["dino_head"], networks["ibot_head"]
    assert isinstance(dino, Anchors)
    assert isinstance(ibot, Anchors)
    least = max(len(dino.features), len(ibot.features))
    classes, patches, have = [], [], 0
    for crops in global_crops:
        (seen,) = networks["backbone"]([crops])
        grid = seen.patches.flatten(0, 1)
        count = min(-(-len(ibot.features) * len(crops) // least), len(grid))
        drawn = torch.randperm(len(grid), generator=rng)[:count]
        classes.append(distributed.all_gather_rows(seen.cls.float()))
        patches.append(distributed.all_gather_rows(grid[drawn.to(grid.device)].float()))
        have += len(classes[-1])
        if have >= least:
            break
    dino.fill(torch.cat(classes))
    ibot.fill(torch.cat(patches))


def _of_run(config: Config, run: Path) -> nn.ModuleDict:
    """The EMA teacher of a run, with the heads that it was trained with."""
    assert config.distill is not None
    theirs, model, _ = load_run(run, config.distill.iteration)
    for head in ("dino_head", "ibot_head"):
        there = getattr(theirs.objective, head) or theirs.objective.dino_head
        here = getattr(config.objective, head) or config.objective.dino_head
        if here.prototypes != there.prototypes:
            raise UserError(
                f"objective.{head}.prototypes {here.prototypes}: the teacher {run} has "
                f"{there.prototypes}; give the same"
            )
    networks = model.teacher
    networks["backbone"] = Resized(
        networks["backbone"], theirs.model.patch_size, config.model.patch_size
    )
    return networks


def _of_timm(config: Config, distill: DistillConfig) -> nn.ModuleDict:
    student = config.model.patch_size
    grid = config.crops.global_size // student
    patch = _patch_size(distill.teacher)
    side = grid * patch
    backbone = TimmBackbone(_timm_model(distill, side))
    try:
        with torch.no_grad():
            (seen,) = backbone([torch.zeros(1, 3, side, side)])
    except Exception as error:  # whatever a model of another kind does with such an image
        why = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{_named(distill)}: can't teach at {side} pixels: {why}") from None
    if seen.patches.shape[1] != grid * grid:
        raise UserError(
            f"{_named(distill)}: sees {seen.patches.shape[1]} patches in a crop of {side} pixels, "
            f"the student {grid * grid}; choose another teacher"
        )
    width = seen.cls.shape[1]
    heads = config.objective
    ibot = heads.ibot_head or heads.dino_head
    return nn.ModuleDict(
        {
            "backbone": Resized(backbone, patch, student),
            "dino_head": Anchors(width, heads.dino_head.prototypes),
            "ibot_head": Anchors(width, ibot.prototypes),
        }
    )


def _named(distill: DistillConfig) -> str:
    return f"distill.teacher (--teacher) {distill.teacher}"


def _patch_size(name: str) -> int:
    """Pixels from one token of a timm model to the next, without making its weights."""
    if not timm.is_model(name):
        near = ", ".join(get_close_matches(name.split(".")[0], timm.list_models(), 3)) or "none"
        raise UserError(
            f"distill.teacher (--teacher) {name}: neither the folder of a run nor a model of timm; "
            f"near: {near}"
        )
    with torch.device("meta"):
        info: Any = timm.create_model(name, pretrained=False).feature_info
    return int(info[-1]["reduction"])


def _timm_model(distill: DistillConfig, size: int) -> nn.Module:
    """With its weights, for square images of `size` pixels where the model must know."""
    hub = distill.weights == "hub"
    try:
        try:
            model = timm.create_model(distill.teacher, hub, num_classes=0, img_size=size)
        except TypeError:  # a convolutional network takes any size
            model = timm.create_model(distill.teacher, hub, num_classes=0)
    except Exception as error:  # the hub's client raises many types
        why = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"{_named(distill)}: no weights from the hub: {why}; give a file with --teacher-weights"
        ) from None
    if not hub:
        _load_exactly(model, distill)
    return model.eval()  # before it sees anything: batch norms would remember


def _load_exactly(model: nn.Module, distill: DistillConfig) -> None:
    """Every weight of the backbone comes from the file, which may hold a classifier besides."""
    field = f"distill.weights (--teacher-weights) {distill.weights}"
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = weights.read(Path(distill.weights))
        if any(name.startswith(TRAINING) for name in state):
            state = weights.backbone_of(state)
        missing, unknown = model.load_state_dict(
            convert(state, model) if convert else state, strict=False
        )
    except OSError as error:
        raise UserError(f"{field}: {error.strerror}") from None
    except Exception as error:  # not a file of weights, or of other shapes
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{field}: not weights of {distill.teacher}: {why}") from None
    faults = [f"lacks {name}" for name in missing if not name.startswith(CLASSIFIERS)]
    faults += [f"has {name}" for name in unknown if not name.startswith(CLASSIFIERS)]
    if faults:
        raise UserError(f"{field}: not weights of {distill.teacher}: it {'; it '.join(faults[:3])}")


def blocks_of(networks: nn.ModuleDict) -> list[nn.Module]:
    """Transformer blocks of the backbone, to be sharded each by itself; none of other models."""
    backbone = networks["backbone"].get_submodule("backbone")
    inner = backbone.model if isinstance(backbone, TimmBackbone) else backbone
    return list(getattr(inner, "blocks", ()))
