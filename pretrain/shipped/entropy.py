"""Differential entropy by nearest neighbours (Kozachenko-Leonenko): spreads descriptors evenly."""

import torch


def entropy_loss(
    views: torch.Tensor,
    ids: torch.Tensor,
    memory: torch.Tensor,
    memory_ids: torch.Tensor,
) -> torch.Tensor:
    """-mean log distance to the nearest view of another image. SSCD (Pizzi et al. 2022), eq. 3.

    views (B, D) unit norm, ids (B,); memory (M, D), memory_ids (M,). Distances are Euclidean. The
    nearest view is found without a gradient, which flows through the one distance only.
    """
    others = torch.cat([views.detach(), memory])
    other_ids = torch.cat([ids, memory_ids])
    with torch.no_grad():
        cosine = views @ others.T
        nearest = cosine.masked_fill(ids[:, None] == other_ids[None, :], -torch.inf).argmax(dim=1)
    partner = torch.where(
        (nearest < views.shape[0])[:, None],
        views[nearest.clamp(max=views.shape[0] - 1)],  # in the batch: the gradient goes both ways
        others[nearest],
    )
    # 1e-6: two files of one photo are at distance 0, where log has no gradient to give.
    distance = (views - partner).square().sum(dim=1).add(1e-6).sqrt()
    return -distance.log().mean()
