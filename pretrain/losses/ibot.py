"""iBOT: the student's tokens of masked patches against what the teacher sees there."""

import torch

from pretrain.losses.centering import Targets
from pretrain.losses.cross_entropy import Term


def ibot_term(targets: Targets, masks_weight: torch.Tensor, images: int, weight: float) -> Term:
    """M targets, masks_weight (M,) = 1 / masked patches of the row's image.

    Mean over the masked patches of an image, then over all `images` = 2B global crops: one without
    a mask counts as zero.
    """
    return Term(targets.rows, masks_weight.float() * (weight / images))
