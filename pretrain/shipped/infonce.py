"""InfoNCE over the views of a batch, with a memory of recent views as further negatives."""

import torch
from torch.nn import functional


def info_nce(
    views: torch.Tensor,
    ids: torch.Tensor,
    memory: torch.Tensor,
    memory_ids: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Mean over views of -log softmax(positive); other views of the same image are no negatives.

    views (B, D) unit norm, ids (B,) the image of each view, each id exactly twice in the batch;
    memory (M, D) and memory_ids (M,), M may be 0. SSCD (Pizzi et al. 2022), eq. 2: the memory
    stands in for their batch of 4,096 over many GPUs.
    """
    batch = views.shape[0]
    logits = views @ torch.cat([views, memory]).T / temperature  # (B, B + M)
    same = ids[:, None] == torch.cat([ids, memory_ids])[None, :]
    itself = torch.zeros_like(same)
    itself[:, :batch].fill_diagonal_(True)
    positive = same & ~itself
    positive[:, batch:] = False  # only the partner in the batch carries a gradient
    target = positive[:, :batch].float().argmax(dim=1)
    return functional.cross_entropy(logits.masked_fill(same & ~positive, -torch.inf), target)
