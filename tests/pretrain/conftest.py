"""Images and a config that take a run a second."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training import TINY


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As the processes below have: with other threads sums differ in the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of three colours, a folder a colour."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(24):
        colour = np.eye(3)[number % 3] * 180 + rng.integers(0, 60, (40, 48, 3))
        (folder / f"colour{number % 3}").mkdir(exist_ok=True)
        path = folder / f"colour{number % 3}" / f"{number:02d}.png"
        Image.fromarray(colour.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return path
