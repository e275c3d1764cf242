"""A random ViT teacher and a folder of generated pictures: nothing here needs a download."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

TEACHER = "deit_tiny_patch16_224"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)  # sums then always come in one order: weights are compared by the bit


@pytest.fixture(scope="session")
def teacher_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model(TEACHER, pretrained=False).half().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of smooth colour patches, and a file that is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        rng = np.random.default_rng(number)
        patches = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
        name = f"{'deeper/' if number % 2 else ''}{number:02d}.jpg"
        (folder / name).parent.mkdir(exist_ok=True)
        patches.resize((144, 120), Image.Resampling.BICUBIC).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"not a picture")
    return folder
