"""Small real models and pictures, so that every test runs the real pipeline in seconds."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from workbench import Models, Project, make_models, make_project

from curation.algorithms import coarse, products


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: of two processes neither has a long one left when the other has none."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def project(tmp_path: Path, models: Models) -> Callable[..., Project]:
    """Makes a project as `make_project` does."""
    return functools.partial(make_project, tmp_path, models)


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


@pytest.fixture(params=["bytes", "floats"])
def multiplied_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test as on this processor, and as on one that multiplies no int8."""
    if request.param == "floats":
        monkeypatch.setattr(products, "multiplies_bytes", lambda: False)
        monkeypatch.setattr(coarse, "multiplies_bytes", lambda: False)
    kind: str = request.param
    return kind
