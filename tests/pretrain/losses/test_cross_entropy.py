"""The chunked cross-entropy against whole matrices in fp64, values and gradients."""

import pytest
import torch
from torch.nn import functional

from pretrain import scores
from pretrain.losses import cross_entropy
from pretrain.losses.centering import Targets
from pretrain.losses.cross_entropy import Term, soft_cross_entropy
from pretrain.losses.dino import dino_terms
from pretrain.losses.ibot import ibot_term
from pretrain.scores import Scores

PROTOTYPES, WIDTH, IMAGES, LOCALS, MASKED = 40, 6, 3, 4, 11
TEMPERATURE = 0.1


@pytest.fixture(autouse=True, params=["processor", "GPU"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose operations are run."""
    if request.param == "GPU":
        for module in (scores, cross_entropy):
            monkeypatch.setattr(module, "on_cpu", lambda _: False)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(
    sharpness: float = 1.0,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    """features, v, g; targets of DINO and iBOT; weights of the masked patches."""
    rows = 2 * IMAGES + LOCALS * IMAGES + MASKED
    features = functional.normalize(random(rows, WIDTH, seed=0), dim=1)
    inputs = [features, random(PROTOTYPES, WIDTH, seed=1), 1 + 0.3 * random(PROTOTYPES, 1, seed=2)]
    inputs[2] = inputs[2] * sharpness
    dino = random(2 * IMAGES, PROTOTYPES, seed=3).mul(3).softmax(dim=1)
    ibot = random(MASKED, PROTOTYPES, seed=4).mul(3).softmax(dim=1)
    return inputs, dino, ibot, random(MASKED, seed=5).abs()


def oracle(
    inputs: list[torch.Tensor], dino: torch.Tensor, ibot: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """(3,) losses: every pair of crops for itself. Local crops lie image by image."""
    features, v, g = inputs
    logits = features @ (g * v / v.norm(dim=1, keepdim=True)).T / TEMPERATURE
    log_p = logits.log_softmax(dim=1)
    whole, local, patches = log_p.split([2 * IMAGES, LOCALS * IMAGES, MASKED])
    pairs = 2 + 2 * LOCALS
    by_global = -(dino * whole).sum(dim=1).mean() * 2
    by_local = sum(
        -(target * crop).sum(dim=1).mean()
        for crop in local.unflatten(0, (IMAGES, LOCALS)).unbind(dim=1)
        for target in dino.chunk(2)
    )
    by_patch = -((ibot * patches).sum(dim=1) * weights).sum() / (2 * IMAGES)
    return torch.stack([by_global / pairs, by_local / pairs, 0.5 * by_patch])


def terms(dino: torch.Tensor, ibot: torch.Tensor, weights: torch.Tensor) -> tuple[Term, ...]:
    of_classes = dino_terms(given(dino.float()), LOCALS * IMAGES, 1.0)
    return (*of_classes, ibot_term(given(ibot.float()), weights, 2 * IMAGES, 0.5))


def given(probabilities: torch.Tensor) -> Targets:
    """Targets that are just these."""
    nothing = torch.zeros(PROTOTYPES)
    return Targets(Scores(probabilities.log(), torch.eye(PROTOTYPES)), 1.0, nothing)


@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("sharpness", [1.0, 200.0])
def test_losses_and_gradients_are_those_of_whole_matrices(rows: int, sharpness: float) -> None:
    inputs, dino, ibot, weights = case(sharpness)
    exact = [value.clone().requires_grad_() for value in inputs]
    expected = oracle(exact, dino, ibot, weights)
    (3.0 * expected.sum()).backward()

    ours = [value.float().requires_grad_() for value in inputs]
    total, each = soft_cross_entropy(
        ours[0], (ours[1], ours[2]), terms(dino, ibot, weights), TEMPERATURE, rows * 4 * PROTOTYPES
    )
    (3.0 * total).backward()
    assert torch.allclose(each.double(), expected.detach(), rtol=1e-5)
    assert total.item() == pytest.approx(expected.sum().item(), rel=1e-5)
    assert not each.requires_grad
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine.grad - theirs.grad).norm() < 1e-5 * theirs.grad.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_products_come_near(dtype: torch.dtype) -> None:
    inputs, dino, ibot, weights = case()
    exact = [value.clone().requires_grad_() for value in inputs]
    (1e-6 * oracle(exact, dino, ibot, weights).sum()).backward()  # weights that fp16 has not
    ours = [value.float().requires_grad_() for value in inputs]
    small = [
        Term(term.targets, term.weights * 1e-6, term.mass) for term in terms(dino, ibot, weights)
    ]
    with torch.autocast("cpu", dtype):
        total, _ = soft_cross_entropy(ours[0], (ours[1], ours[2]), small, TEMPERATURE)
        total.backward()
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.grad.dtype == torch.float32
        assert (mine.grad - theirs.grad).norm() < 0.02 * theirs.grad.norm()


def test_a_rank_without_masked_patches_takes_part() -> None:
    features = torch.zeros(0, WIDTH, requires_grad=True)
    v, g = random(PROTOTYPES, WIDTH, seed=1).float().requires_grad_(), torch.ones(PROTOTYPES, 1)
    nothing = ibot_term(given(torch.zeros(0, PROTOTYPES)), torch.zeros(0), 6, 1.0)
    total, each = soft_cross_entropy(features, (v, g), [nothing], TEMPERATURE)
    total.backward()
    assert total.item() == 0
    assert each.tolist() == [0.0]
    assert not v.grad.any()
