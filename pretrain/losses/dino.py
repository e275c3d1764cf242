"""DINO: the student's class tokens of every crop against the teacher's of the global crops."""

import torch

from pretrain.losses.cross_entropy import Term


def dino_terms(targets: torch.Tensor, local_rows: int, weight: float) -> tuple[Term, Term]:
    """(global, local) terms; their sum is `weight` times the mean over all pairs of crops.

    targets (2B, K), in the order in which they match the student's global class tokens: those of
    the other view. local_rows = L B, crop by crop. The mean is over 2 + 2 L pairs and B images.
    A local crop is compared with both views: cross-entropy is linear in its target, so once, with
    their sum.
    """
    images = len(targets) // 2
    each = weight / (2 * images + 2 * local_rows)
    both = targets[:images] + targets[images:]
    image = torch.arange(local_rows, device=targets.device) % images

    def of_globals(start: int, stop: int) -> torch.Tensor:
        return targets[start:stop]

    def of_locals(start: int, stop: int) -> torch.Tensor:
        return both[image[start:stop]]

    return (
        Term(of_globals, targets.new_full((2 * images,), each)),
        Term(of_locals, targets.new_full((local_rows,), each), mass=2.0),
    )
