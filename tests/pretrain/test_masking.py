import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.masking import MaskingConfig, Masks, draw_masks

CONFIG = MaskingConfig()


@settings(max_examples=60, deadline=None)
@given(
    images=st.integers(2, 24),
    grid=st.integers(3, 20),
    probability=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_masks_hold_what_the_recipe_says(
    images: int, grid: int, probability: float, seed: int
) -> None:
    config = MaskingConfig(probability)
    drawn = draw_masks(images, grid, np.random.default_rng(seed), config)
    count, masked = drawn.tokens.sum(dim=1), int(images * probability)
    edges = np.linspace(0.1, 0.5, masked + 1)
    assert (count > 0).sum() <= masked
    # Each bin has one image at most as full as its upper edge allows.
    most = sorted(int(grid * grid * high) for high in edges[1:])
    fullest = sorted(count.tolist())[images - masked :]
    assert all(found <= bound for found, bound in zip(fullest, most, strict=True))
    assert drawn.upper_bound == sum(most) >= len(drawn.indices)
    assert_located(drawn)


def assert_located(drawn: Masks) -> None:
    flat = torch.zeros(drawn.tokens.numel(), dtype=torch.bool)
    flat[drawn.indices] = True
    assert torch.equal(flat.view_as(drawn.tokens), drawn.tokens)
    image = drawn.indices // drawn.tokens.shape[1]
    assert torch.allclose(drawn.weights, 1 / drawn.tokens.sum(dim=1)[image].float())
    total = torch.zeros(len(drawn.tokens)).index_add(0, image, drawn.weights)
    assert torch.allclose(total, (drawn.tokens.any(dim=1)).float())


def test_exactly_half_of_the_images_are_masked_each_in_its_own_bin() -> None:
    for seed in range(20):
        drawn = draw_masks(16, 16, np.random.default_rng(seed))
        ratios = sorted((drawn.tokens.sum(dim=1) / 256).tolist())
        assert ratios[:8] == [0.0] * 8
        edges = np.linspace(0.1, 0.5, 9)
        for ratio, low, high in zip(ratios[8:], edges, edges[1:], strict=False):
            # Block-wise masks may stop a few patches short of what was asked for.
            assert low - 0.06 < ratio <= high


def test_the_order_is_shuffled_and_the_generator_decides() -> None:
    masked = [draw_masks(8, 16, np.random.default_rng(s)).tokens.any(dim=1) for s in range(30)]
    assert torch.stack(masked).sum(dim=0).min() >= 8
    again = draw_masks(8, 16, np.random.default_rng(0))
    assert torch.equal(again.tokens.any(dim=1), masked[0])
    assert not torch.equal(again.tokens, draw_masks(8, 16, np.random.default_rng(1)).tokens)


@pytest.mark.parametrize("grid", [16, 37])
def test_masks_are_blocks(grid: int) -> None:
    """Masked patches mostly have masked neighbours, unlike scattered ones at the same ratio."""
    drawn = draw_masks(32, grid, np.random.default_rng(0))
    mask = drawn.tokens.view(32, grid, grid)
    pairs = (mask[:, 1:] & mask[:, :-1]).sum() / mask[:, 1:].sum()
    assert pairs > 0.6
