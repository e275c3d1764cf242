"""Small real models and pictures, so that every test runs the real pipeline in seconds."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from workbench import GridDescriptor, Models, Project, write_pictures


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: of two processes neither has a long one left when the other has none."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    net = timm.create_model("test_vit", num_classes=0)
    save_file(net.state_dict(), folder / "test_vit.safetensors")
    torch.jit.script(GridDescriptor()).save(str(folder / "grid.torchscript.pt"))
    return Models(folder / "test_vit.safetensors", folder / "grid.torchscript.pt")


@pytest.fixture
def project(tmp_path: Path, models: Models) -> Callable[..., Project]:
    """Makes a project: `pool` and `curated` pictures by seed, `holdout` if there are any."""

    def make(
        pool: Iterable[int] = range(40),
        curated: Iterable[int] = range(100, 106),
        holdout: Iterable[int] = (),
        **sections: Any,
    ) -> Project:
        write_pictures(tmp_path / "pool", pool)
        write_pictures(tmp_path / "curated", curated)
        sources: dict[str, Any] = {
            "pool": [{"uri": str(tmp_path / "pool")}],
            "curated": {"wanted": {"uri": str(tmp_path / "curated")}},
        }
        if holdout:
            write_pictures(tmp_path / "holdout", holdout)
            sources["holdout"] = {"test": {"uri": str(tmp_path / "holdout")}}
        recipe = {
            "name": "test",
            "output": str(tmp_path / "run"),
            "sources": sources,
            "encoder": {"model": "test_vit", "weights": str(models.encoder)},
            "copy_descriptor": {"weights": str(models.descriptor)},
            "dedup": {"min_cosine": 0.95, "holdout_min_cosine": 0.9},
            "cluster": {"k": 5},
            "shards": {"images_per_shard": 8},
            "resources": {"part_images": 16},
        }
        recipe.update(sections)
        return Project(tmp_path, recipe)

    return make


@pytest.fixture(scope="session")
def shared() -> Path:
    """The benchmark images and golden values, where there are any (LVD_SHARED or ../shared)."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("LVD_SHARED", root.parent / "shared"))
    if not (folder / "bench").is_dir():
        pytest.skip("no shared benchmark images here")
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium, when there is one."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with its driver is installed here")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{flag}")
    options.add_argument("--disable-background-networking")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield window
    window.quit()
