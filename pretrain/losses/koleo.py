"""KoLeo: spreads class tokens by the distance to the nearest other one in the batch."""

import torch
from torch.nn import functional

EPS = 1e-8
COPIES = 1e-6  # features this near are of one image: rounding alone sets them apart


def koleo_loss(features: torch.Tensor) -> torch.Tensor:
    """(B, D) -> scalar: -mean log distance to the nearest neighbour, after unit norm, in fp32.

    Sablayrolles et al. 2019, with the eps of DINOv2's code: two copies of one image give a finite
    loss, and no gradient, which would be 1 / eps in a direction that means nothing. 0 for B = 1,
    which has no neighbour.
    """
    with torch.autocast(features.device.type, enabled=False):
        unit = functional.normalize(features.float(), eps=EPS, dim=-1)
        if len(unit) < 2:
            return unit.sum() * 0.0
        with torch.no_grad():
            nearest = (unit @ unit.T).fill_diagonal_(-torch.inf).argmax(dim=1)
        distance = functional.pairwise_distance(unit, unit[nearest], eps=EPS)
        distance = torch.where(distance > COPIES, distance, distance.detach())
        return -(distance + EPS).log().mean()
