"""Compiled colour operations against torchvision's on the same uint8 crops."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from numpy.typing import NDArray
from PIL import Image

from pretrain.pixels import BRIGHTNESS, CONTRAST, HUE, SATURATION, finish

Pixels = NDArray[np.uint8]
NO_OPERATION = np.empty(0, np.int64)
NEUTRAL = np.array([1.0, 1.0, 1.0, 0.0])

# Levels may differ where a value lies at the edge of two: by at most this share of them, by one.
RARE = 2e-3


def crops() -> list[Pixels]:
    """Smooth, noisy, dark, grey and one-coloured (3, H, W) crops, some not square."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (3, 41, 23), np.uint8)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    smooth = np.asarray(coarse.resize((64, 48), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    grey = np.repeat(noise[:1], 3, axis=0)
    one = np.broadcast_to(np.array([200, 30, 90], np.uint8)[:, None, None], (3, 9, 9))
    return [np.ascontiguousarray(x) for x in (noise, smooth, smooth // 8, grey, one)]


def ours(
    crop: Pixels,
    operations: NDArray[np.int64] = NO_OPERATION,
    factors: NDArray[np.float64] = NEUTRAL,
    flip: bool = False,
    grey: bool = False,
    sigma: float = 0.0,
    threshold: int = 256,
) -> Pixels:
    out = np.empty_like(crop)
    finish(crop, flip, operations, factors, grey, sigma, threshold, out)
    return out


def theirs(function: Callable[..., torch.Tensor], crop: Pixels, *arguments: object) -> Pixels:
    result: Pixels = function(torch.from_numpy(crop), *arguments).numpy()
    return result


def assert_alike(found: Pixels, expected: Pixels, rare: float = RARE, most: int = 1) -> None:
    difference = np.abs(found.astype(np.int64) - expected)
    assert difference.max() <= most
    assert np.count_nonzero(difference) <= max(rare * difference.size, 1)


def test_nothing_to_do_leaves_the_crop_as_it_is() -> None:
    for crop in crops():
        assert np.array_equal(ours(crop), crop)
        assert np.array_equal(ours(crop, flip=True), crop[:, :, ::-1])


@pytest.mark.parametrize(
    ("operation", "function", "values"),
    [
        (BRIGHTNESS, tv.adjust_brightness, (0.6, 0.83, 1.0, 1.4)),
        (CONTRAST, tv.adjust_contrast, (0.6, 0.83, 1.0, 1.4)),
        (SATURATION, tv.adjust_saturation, (0.8, 0.93, 1.0, 1.2)),
        (HUE, tv.adjust_hue, (-0.1, -0.03, 0.0, 0.07, 0.1, 0.5, -0.5)),
    ],
)
def test_each_jitter_operation_is_torchvisions(
    operation: int, function: Callable[..., torch.Tensor], values: tuple[float, ...]
) -> None:
    for crop in crops():
        for value in values:
            factors = NEUTRAL.copy()
            factors[operation] = value
            found = ours(crop, np.array([operation]), factors)
            assert_alike(found, theirs(function, crop, value))


def test_operations_in_any_order_are_torchvisions_one_after_the_other() -> None:
    functions = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    rng = np.random.default_rng(1)
    for _ in range(30):
        order = rng.permutation(4)
        factors = rng.uniform([0.6, 0.6, 0.8, -0.1], [1.4, 1.4, 1.2, 0.1])
        for crop in crops():
            expected = crop
            for operation in order:
                expected = theirs(functions[operation], expected, float(factors[operation]))
            # A level that differs by one before hue is turned may differ by a few after it.
            assert_alike(ours(crop, order, factors), expected, rare=0.02, most=4)


def test_grey_and_solarize_are_torchvisions() -> None:
    for crop in crops():
        assert_alike(ours(crop, grey=True), theirs(tv.rgb_to_grayscale, crop, 3))
        assert np.array_equal(ours(crop, threshold=128), theirs(tv.solarize, crop, 128))


@pytest.mark.parametrize("sigma", [0.1, 0.35, 1.0, 2.0])
def test_blur_is_torchvisions(sigma: float) -> None:
    for crop in crops():
        expected = theirs(tv.gaussian_blur, crop, [9, 9], [sigma, sigma])
        assert_alike(ours(crop, sigma=sigma), expected)


def test_the_smallest_crop_can_be_blurred() -> None:
    crop = np.random.default_rng(0).integers(0, 256, (3, 5, 5), np.uint8)
    assert_alike(ours(crop, sigma=2.0), theirs(tv.gaussian_blur, crop, [9, 9], [2.0, 2.0]))


def test_all_together_keep_the_official_order() -> None:
    crop = crops()[1]
    factors = np.array([1.2, 0.8, 1.1, 0.05])
    expected = theirs(tv.horizontal_flip, crop)
    steps = (
        (tv.adjust_hue, 0.05),
        (tv.adjust_brightness, 1.2),
        (tv.rgb_to_grayscale, 3),
        (tv.gaussian_blur, [9, 9], [1.3, 1.3]),
        (tv.solarize, 128),
    )
    for function, *arguments in steps:
        expected = theirs(function, expected, *arguments)
    found = ours(crop, np.array([HUE, BRIGHTNESS]), factors, True, True, 1.3, 128)
    # A level beside the threshold may be inverted on one side only.
    off = np.abs(found.astype(np.int64) - expected) > 1
    assert off.mean() < 2 * RARE
