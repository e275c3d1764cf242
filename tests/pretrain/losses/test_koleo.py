import math

import pytest
import torch

from pretrain.losses.koleo import koleo_loss


def features(count: int) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("count", [2, 9])
def test_it_is_the_log_distance_to_the_nearest_other(count: int) -> None:
    rows = (features(count) / features(count).norm(dim=1, keepdim=True)).tolist()
    total = 0.0
    for i, row in enumerate(rows):
        total -= math.log(min(math.dist(row, other) for j, other in enumerate(rows) if j != i))
    assert koleo_loss(features(count)).item() == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_two_copies_of_an_image_give_a_finite_loss(dtype: torch.dtype) -> None:
    twice = features(1).repeat(3, 1).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = koleo_loss(twice)
    (gradient,) = torch.autograd.grad(loss, twice)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_one_image_has_no_neighbour() -> None:
    alone = features(1).requires_grad_()
    loss = koleo_loss(alone)
    loss.backward()
    assert loss.item() == 0
    assert not alone.grad.any()


def test_it_pushes_neighbours_apart() -> None:
    angles = torch.tensor([0.0, 0.1, 2.0])
    rows = torch.stack([angles.cos(), angles.sin()], dim=1).requires_grad_()
    (gradient,) = torch.autograd.grad(koleo_loss(rows), rows)
    moved = rows - 0.001 * gradient
    assert torch.dist(moved[0], moved[1]) > torch.dist(rows[0], rows[1])
