"""Layout of a batch, and normalisation against torchvision's."""

import numpy as np
import torch
import torchvision.transforms.v2.functional as tv
from workbench import picture

from pretrain.collate import IMAGENET_MEAN, IMAGENET_STD, Decoded, collate, normalise
from pretrain.crops import CropConfig, multi_crop
from pretrain.order import augmentation_rng

CFG = CropConfig(global_size=12, local_size=6, local_crops=3)


def test_crops_come_one_after_the_other_as_in_the_official_batch() -> None:
    pixels = [np.array(picture(seed, 40, 30)) for seed in range(4)]
    images = [Decoded(f"k{i}", p, augmentation_rng(0, i)) for i, p in enumerate(pixels)]
    batch = collate(images, 4, 100, CFG)
    assert batch.keys == ["k0", "k1", "k2", "k3"]
    assert (batch.position, batch.bad) == (100, [])
    for i, image in enumerate(pixels):
        outs = [np.empty((3, side, side), np.uint8) for side in (12, 12, 6, 6, 6)]
        multi_crop(image, augmentation_rng(0, i), CFG, outs)
        for crop in range(2):
            assert np.array_equal(batch.global_crops[crop * 4 + i], outs[crop])
        for crop in range(3):
            assert np.array_equal(batch.local_crops[crop * 4 + i], outs[2 + crop])


def test_no_local_crops_are_an_empty_tensor() -> None:
    image = Decoded("k", np.zeros((9, 9, 3), np.uint8), augmentation_rng(0, 0))
    batch = collate([image], 1, 0, CropConfig(global_size=12, local_size=6, local_crops=0))
    assert batch.local_crops.shape == (0, 3, 6, 6)


def test_normalising_is_torchvisions() -> None:
    crops = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    expected = tv.normalize(crops.float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert torch.allclose(normalise(crops, "cpu"), expected, atol=2e-6)
    half = normalise(crops, "cpu", torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, normalise(crops, "cpu").bfloat16())
