"""What is drawn, against torchvision's distributions; what comes out, against its transforms."""

import dataclasses

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from torchvision.transforms import ColorJitter, RandomResizedCrop
from workbench import picture

from pretrain.crops import (
    GLOBAL_CROPS,
    NEVER,
    CropConfig,
    Plan,
    draw_boxes,
    draw_plan,
    multi_crop,
    resize,
)
from pretrain.decode import Pixels
from pretrain.order import augmentation_rng

FULL = CropConfig()
SMALL = CropConfig(global_size=32, local_size=14, local_crops=3)


def crop_all(image: Pixels, seed: int, cfg: CropConfig = SMALL) -> list[Pixels]:
    sides = [cfg.global_size] * GLOBAL_CROPS + [cfg.local_size] * cfg.local_crops
    outs = [np.zeros((3, side, side), np.uint8) for side in sides]
    multi_crop(image, augmentation_rng(seed, 0), cfg, outs)
    return outs


def plans(count: int, cfg: CropConfig = FULL) -> list[Plan]:
    return [draw_plan(augmentation_rng(0, number), 300, 400, cfg) for number in range(count)]


def column(found: list[Plan], name: str) -> np.ndarray:  # type: ignore[type-arg]
    """(plans, crops, …)"""
    return np.stack([getattr(plan, name) for plan in found])


@pytest.mark.parametrize("size", [(300, 400), (97, 61), (40, 400), (500, 30), (1, 1), (3, 2)])
@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
def test_boxes_are_distributed_as_torchvisions(
    size: tuple[int, int], scale: tuple[float, float]
) -> None:
    count, (height, width) = 4000, size
    drawn = np.random.default_rng(0).random((count, 22))
    found = draw_boxes(drawn, height, width, np.array([scale] * count))
    torch.manual_seed(0)
    canvas = torch.empty(1, height, width)
    params = [
        RandomResizedCrop.get_params(canvas, list(scale), [3 / 4, 4 / 3]) for _ in range(count)
    ]
    expected = np.array(params, dtype=np.float64)
    assert (found[:, :2] >= 0).all()
    assert (found[:, 2:] >= 1).all()
    assert (found[:, 0] + found[:, 2] <= height).all()
    assert (found[:, 1] + found[:, 3] <= width).all()
    for values, reference in zip(found.T, expected.T, strict=True):
        # The largest distance of the two distribution functions (Kolmogorov-Smirnov, p = .001).
        grid = np.unique(np.concatenate([values, reference]))
        steps = [np.searchsorted(np.sort(v), grid, "right") / count for v in (values, reference)]
        assert np.abs(steps[0] - steps[1]).max() < 1.95 * np.sqrt(2 / count)


def test_probabilities_are_those_of_the_recipe() -> None:
    found, count = plans(2500), 2500
    assert np.allclose(column(found, "flip").mean(axis=0), 0.5, atol=4 * 0.5 / count**0.5)
    assert np.allclose(column(found, "jitter").mean(axis=0), 0.8, atol=4 * 0.4 / count**0.5)
    assert np.allclose(column(found, "grey").mean(axis=0), 0.2, atol=4 * 0.4 / count**0.5)
    solarized = (column(found, "threshold") == 128).mean(axis=0)
    assert abs(solarized[1] - 0.2) < 4 * 0.4 / count**0.5
    assert (np.delete(solarized, 1) == 0).all()
    assert set(np.unique(column(found, "threshold"))) == {128, NEVER}
    first = column(found, "operations")[:, :, 0]
    assert np.allclose(np.bincount(first.ravel()) / first.size, 0.25, atol=0.012)


@pytest.mark.parametrize(
    ("blur", "probabilities"),
    [("paper", [1.0, 0.1] + [0.5] * 8), ("official", [0.0, 0.9] + [0.5] * 8)],
)
def test_blur_is_the_papers_or_the_official_codes(blur: str, probabilities: list[float]) -> None:
    found = plans(2500, dataclasses.replace(CropConfig(), blur=blur))  # type: ignore[arg-type]
    sigma = column(found, "sigma")
    assert np.allclose((sigma > 0).mean(axis=0), probabilities, atol=0.04)
    drawn = sigma[sigma > 0]
    assert 0.1 <= drawn.min() < 0.11
    assert 1.99 < drawn.max() <= 2.0
    assert abs(drawn.mean() - 1.05) < 0.02


def test_factors_are_distributed_as_torchvisions_color_jitter() -> None:
    factors = column(plans(600), "factors").reshape(-1, 4)
    torch.manual_seed(0)
    jitter = ColorJitter(0.4, 0.4, 0.2, 0.1)
    ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    params = [ColorJitter.get_params(*ranges)[1:] for _ in range(3000)]
    expected = np.array(params, dtype=np.float64)
    for quantile in (0.0, 0.1, 0.5, 0.9, 1.0):
        ours, theirs = (np.quantile(x, quantile, axis=0) for x in (factors, expected))
        assert np.allclose(ours, theirs, atol=0.03)


@pytest.mark.parametrize("size", [(50, 70), (14, 20), (200, 31), (7, 5)])
@pytest.mark.parametrize("side", [14, 32, 98])
def test_resize_is_pillows(size: tuple[int, int], side: int) -> None:
    """Torch keeps its weights in 16 bits, Pillow in 32: rarely more than one level apart."""
    image = picture(3, size[1], size[0])
    expected = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    difference = np.abs(resize(np.array(image), side, side).astype(np.int64) - expected)
    assert difference.mean() < 0.15
    assert difference.max() <= 3


def test_crops_are_torchvisions_of_the_same_parameters() -> None:
    image = np.array(picture(5, 90, 70))
    for seed in range(40):
        found = crop_all(image, seed)
        plan = draw_plan(augmentation_rng(seed, 0), 70, 90, SMALL)
        for number, out in enumerate(found):
            expected = reference_crop(image, plan, number, out.shape[1])
            off = np.abs(out.astype(np.int64) - expected.numpy())
            if plan.threshold[number] == NEVER:
                assert off.max() <= 6  # a level of resizing, turned by hue
            assert off.mean() < 1.5


def reference_crop(image: Pixels, plan: Plan, number: int, side: int) -> torch.Tensor:
    functions = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    top, left, height, width = plan.boxes[number].tolist()
    whole = Image.fromarray(image)
    bicubic = tv.InterpolationMode.BICUBIC
    crop = tv.pil_to_tensor(tv.resized_crop(whole, top, left, height, width, [side, side], bicubic))
    if plan.flip[number]:
        crop = tv.horizontal_flip(crop)
    if plan.jitter[number]:
        for operation in plan.operations[number]:
            crop = functions[operation](crop, float(plan.factors[number, operation]))
    if plan.grey[number]:
        crop = tv.rgb_to_grayscale(crop, 3)
    if sigma := float(plan.sigma[number]):
        crop = tv.gaussian_blur(crop, [9, 9], [sigma, sigma])
    if plan.threshold[number] != NEVER:
        crop = tv.solarize(crop, int(plan.threshold[number]))
    return crop


def test_crops_depend_on_the_generator_alone() -> None:
    image = np.array(picture(1, 60, 50))
    first, again, other = crop_all(image, 1), crop_all(image.copy(), 1), crop_all(image, 2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 2), (2000, 3)])
def test_images_of_any_shape_are_cropped(size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 77, np.uint8)
    for seed in range(5):
        assert all(crop.any() for crop in crop_all(image, seed))


def test_flipped_views_are_cropped_as_their_copies() -> None:
    image = np.array(picture(1, 60, 50))[::-1, ::-1]
    for a, b in zip(crop_all(image, 3), crop_all(image.copy(), 3), strict=True):
        assert np.array_equal(a, b)
