"""DINO: the student's class tokens of every crop against the teacher's of the global crops."""

import torch

from pretrain.losses.centering import Targets
from pretrain.losses.cross_entropy import Term


def dino_terms(targets: Targets, local_rows: int, weight: float) -> tuple[Term, Term]:
    """(global, local) terms; their sum is `weight` times the mean over all pairs of crops.

    2B targets, in the order in which they match the student's global class tokens: those of the
    other view. local_rows = B L, image by image, so that a chunk needs the targets of few images.
    The mean is over 2 + 2 L pairs and B images. A local crop is compared with both views:
    cross-entropy is linear in its target, so once, with their sum.
    """
    images = len(targets) // 2
    each = weight / (2 * images + 2 * local_rows)
    crops = local_rows // images

    def of_locals(start: int, stop: int) -> torch.Tensor:
        first, last = start // crops, (stop - 1) // crops + 1
        both = targets.rows(first, last) + targets.rows(images + first, images + last)
        image = torch.arange(start, stop, device=both.device) // crops - first
        return both[image]

    of_each = targets.offsets.new_full((2 * images + local_rows,), each)
    return (
        Term(targets.rows, of_each[: 2 * images]),
        Term(of_locals, of_each[2 * images :], mass=2.0),
    )
