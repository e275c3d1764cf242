"""The brightness pattern against its formula, and what it must not see."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.fft import dctn
from torch import Tensor
from torch.nn.functional import normalize
from workbench import picture

from curation.images.brightness import LUMA, BrightnessPattern
from curation.images.encoders import IMAGENET_MEAN, IMAGENET_STD

SIDE, PATTERNS, SHARPNESS = 48, 4096, 12.0


@pytest.fixture(scope="module")
def pattern() -> BrightnessPattern:
    made = BrightnessPattern(SIDE, PATTERNS, IMAGENET_STD)
    made.frequencies.normal_(0, SHARPNESS**0.5, generator=torch.Generator().manual_seed(0))
    made.phases.uniform_(0, 2 * np.pi, generator=torch.Generator().manual_seed(1))
    return made


def photos(count: int) -> Tensor:
    """(count, SIDE, SIDE, 3) levels."""
    images = [picture(seed, SIDE, SIDE).resize((SIDE, SIDE)) for seed in range(count)]
    return torch.from_numpy(np.stack([np.asarray(image, np.float32) for image in images]))


def learned_rows(count: int) -> Tensor:
    return normalize(torch.randn(count, 100, generator=torch.Generator().manual_seed(2)), dim=1)


def rows(pattern: BrightnessPattern, levels: Tensor, learned: Tensor | None = None) -> Tensor:
    scaled = (levels / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    pixels = scaled.permute(0, 3, 1, 2)
    return pattern(pixels, learned_rows(len(levels)) if learned is None else learned)


def form(levels: Tensor) -> NDArray[np.float64]:
    """What the hash is of: an image's 63 lowest coefficients, compressed, as a unit vector."""
    low = dctn(levels.double().numpy() @ np.array(LUMA), norm="ortho")[:8, :8]
    low = (low * np.hypot(*np.mgrid[:8, :8])).ravel()[1:]
    compressed: NDArray[np.float64] = np.tanh(low / np.sqrt(np.mean(low**2)))
    return compressed / np.linalg.norm(compressed)


def test_cosines_are_those_of_a_kernel_of_the_lowest_frequencies(
    pattern: BrightnessPattern,
) -> None:
    """That of the image and of its mirror image, as far as an image is unlike its own mirror."""
    first = photos(1)[0]
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(3))
    levels = torch.stack([first + level * noise for level in (0, 10, 20, 40, 80)])
    found = rows(pattern, levels)
    forms = np.stack([form(image) for image in levels])
    mirrored = np.stack([form(image.flip(1)) for image in levels])

    def kernel(cosines: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.exp(-SHARPNESS * (1 - cosines))

    both = kernel(forms @ forms.T) + kernel(forms @ mirrored.T)
    alone = np.sqrt(both.diagonal())
    np.testing.assert_allclose((found @ found.T).numpy(), both / np.outer(alone, alone), atol=0.06)


def test_colour_contrast_and_mirroring_are_not_seen(pattern: BrightnessPattern) -> None:
    levels = photos(6)
    grey = (levels @ torch.tensor(LUMA))[..., None].expand(-1, -1, -1, 3)
    for copies in (grey, levels.flip(2), levels * 0.7 + 30):
        same = (rows(pattern, levels) * rows(pattern, copies)).sum(dim=1)
        assert same.min() > 0.999


def test_different_pictures_are_far_apart(pattern: BrightnessPattern) -> None:
    found = rows(pattern, photos(6))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(6))
    apart = (found @ found.T)[~torch.eye(6, dtype=torch.bool)]
    assert apart.abs().max() < 0.2


def test_images_of_one_colour_are_told_apart_by_the_learned_part(
    pattern: BrightnessPattern,
) -> None:
    """Their frequencies are rounding, which is alike in all of them."""
    levels = torch.tensor([0.0, 90.0, 90.0, 255.0])[:, None, None, None].expand(-1, SIDE, SIDE, 3)
    learned = learned_rows(4)
    learned[2] = learned[1]
    found = rows(pattern, levels, learned)
    cosine = found @ found.T
    assert cosine[1, 2] > 0.999
    assert cosine[0, 1].abs() < 0.2
    assert cosine[0, 3].abs() < 0.2


def test_few_learned_values_are_enough(pattern: BrightnessPattern) -> None:
    flat = torch.full((2, SIDE, SIDE, 3), 50.0)
    assert rows(pattern, flat, torch.eye(2)).isfinite().all()
