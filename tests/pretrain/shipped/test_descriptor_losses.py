import math

import pytest
import torch
from torch.nn.functional import normalize

from pretrain.shipped.entropy import entropy_loss
from pretrain.shipped.infonce import info_nce

NO_IDS = torch.empty(0, dtype=torch.int64)


def batch(
    images: int, memory: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two views of each image, and a memory that also holds older views of some of them."""
    generator = torch.Generator().manual_seed(images + memory)
    views = normalize(torch.randn(2 * images, 8, generator=generator, dtype=torch.float64))
    old = normalize(torch.randn(memory, 8, generator=generator, dtype=torch.float64))
    ids = torch.arange(images).repeat(2)
    return views.requires_grad_(), ids, old, torch.arange(memory) + images - 2


@pytest.mark.parametrize("memory", [0, 7])
def test_info_nce_is_the_sum_written_out(memory: int) -> None:
    views, ids, old, old_ids = batch(5, memory)
    everything, everyone = torch.cat([views, old]).tolist(), torch.cat([ids, old_ids]).tolist()

    def similar(i: int, j: int) -> float:
        dot = sum(a * b for a, b in zip(everything[i], everything[j], strict=True))
        return math.exp(dot / 0.05)

    total = 0.0
    for i in range(10):
        partner = (i + 5) % 10
        others = [j for j in range(10 + memory) if everyone[j] != everyone[i]]
        negatives = sum(similar(i, j) for j in others)
        total -= math.log(similar(i, partner) / (similar(i, partner) + negatives))
    loss = info_nce(views, ids, old, old_ids, 0.05)
    assert loss.item() == pytest.approx(total / 10, rel=1e-9)


@pytest.mark.parametrize("memory", [0, 7])
def test_entropy_is_the_log_distance_to_the_nearest_other_image(memory: int) -> None:
    views, ids, old, old_ids = batch(5, memory)
    everything, everyone = torch.cat([views, old]).detach(), torch.cat([ids, old_ids])
    total = 0.0
    for i in range(10):
        distances = [
            math.dist(everything[i].tolist(), everything[j].tolist())
            for j in range(10 + memory)
            if everyone[j] != everyone[i]
        ]
        total -= math.log(min(distances))
    loss = entropy_loss(views, ids, old, old_ids)
    assert loss.item() == pytest.approx(total / 10, abs=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert views.grad is not None
    assert views.grad.isfinite().all()


def test_the_entropy_gradient_pushes_the_nearest_apart_from_both_sides() -> None:
    angles = torch.tensor([0.0, 0.1, 2.0], dtype=torch.float64)
    views = torch.stack([angles.cos(), angles.sin()], dim=1).requires_grad_()
    nothing = torch.empty(0, 2, dtype=torch.float64)
    loss = entropy_loss(views, torch.arange(3), nothing, NO_IDS)
    (gradient,) = torch.autograd.grad(loss, views)
    moved = (views - 0.001 * gradient).detach()
    assert torch.dist(moved[0], moved[1]) > torch.dist(views[0], views[1])
    assert (gradient[:2, 1].sign() == torch.tensor([1.0, -1.0])).all()


def test_the_same_photo_twice_keeps_the_entropy_finite() -> None:
    views = normalize(torch.ones(4, 8)).requires_grad_()
    nothing = torch.empty(0, 8)
    loss = entropy_loss(views, torch.tensor([0, 1, 0, 1]), nothing, NO_IDS)
    (gradient,) = torch.autograd.grad(loss, views)
    assert loss.isfinite()
    assert gradient.isfinite().all()
