"""A real run, the real service and a real browser: what a person sees from start to end."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from held import held_run
from served import Served, served

from demo import images

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("one run, watched")]

EVERY = 3  # of the demo's pool
ROOT = Path(__file__).resolve().parents[2]


def until(browser: Any, script: str, wanted: Callable[[Any], bool], timeout_s: float = 240) -> Any:
    """Asks the page until its answer is as wanted."""
    end = time.monotonic() + timeout_s
    while not wanted(value := browser.execute_script(f"return {script}")):
        assert time.monotonic() < end, (script, value)
        time.sleep(0.2)
    return value


def show(browser: Any, width: int, height: int, scheme: str = "light") -> None:
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def pictures(browser: Any) -> list[int]:
    """The widths of all pictures, once those on the screen have loaded."""
    browser.execute_script(
        "document.images.length && [...document.images].map(i=>i.loading='eager')"
    )
    until(browser, "[...document.images].every(image => image.complete)", bool, 60)
    found: list[int] = browser.execute_script(
        "return [...document.images].map(image => image.naturalWidth)"
    )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's sources, and a recipe of a third of its pool."""
    folder = tmp_path_factory.mktemp("seen")
    images.make(folder / "images")
    pool = sorted((folder / "images" / "pool").iterdir())
    for number, path in enumerate(pool):
        if number % EVERY and "broken" not in path.name and ".copy" not in path.name:
            path.unlink()
    for number, path in enumerate(p for p in pool if ".copy" in p.name):
        if number % EVERY:
            path.unlink()
    retrieve = ["as_is", {"sample": {"k": 4}}]
    (folder / "runs").mkdir()
    recipe = {
        "name": "photographs",
        "output": str(folder / "runs" / "photographs"),
        "sources": {
            "pool": [{"uri": str(folder / "images" / "pool")}],
            "curated": {
                "subjects": {"uri": str(folder / "images" / "curated"), "retrieve": retrieve}
            },
        },
        "encoder": {"model": "lvd_demo"},
        "cluster": {"k": 5},
        "resources": {"part_images": 16},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Embeds once somebody watches it: `folder / "go"`."""
    process = held_run(folder / "recipe.yaml", folder / "go", subprocess.DEVNULL, 1.0)
    yield process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def service(folder: Path, running: subprocess.Popen[str]) -> Iterator[Served]:
    """Started when the run has begun: runs that come later are looked for every ten seconds."""
    while not (folder / "runs" / "photographs" / "status").exists():
        assert running.poll() is None
        time.sleep(0.05)
    with served(folder / "runs") as found:
        yield found


@pytest.fixture
def finished(service: Served, running: subprocess.Popen[str], folder: Path) -> Served:
    """The service, when the run has come to its end."""
    (folder / "go").touch()
    assert running.wait(240) == 0
    return service


def test_progress_moves_without_a_reload(
    browser: Any,
    service: Served,
    running: subprocess.Popen[str],
    folder: Path,
    tmp_path: Path,
) -> None:
    show(browser, 1240, 1000)
    browser.get(service.url)
    browser.execute_script("window.opened = true")
    until(browser, "document.querySelector('.card .name')?.textContent", bool)
    link = browser.find_element("css selector", ".card")
    assert link.text.startswith("photographs")
    browser.get(f"{service.url}/runs/photographs")
    browser.execute_script("window.opened = true")
    embed = "document.querySelector('[data-stage=embed]')"
    until(browser, f"{embed}.dataset.state", lambda state: state == "running")
    (folder / "go").touch()
    seen = set()
    while browser.execute_script(f"return {embed}.dataset.state") == "running":
        seen.add(browser.execute_script(f"return {embed}.querySelector('.n').textContent"))
        if len(seen) == 2:
            browser.save_screenshot(tmp_path / "running.png")
        time.sleep(0.3)
    assert len(seen) > 1, seen
    states = "[...document.querySelectorAll('[data-stage]')].map(stage => stage.dataset.state)"
    until(browser, states, lambda found: set(found) == {"done"})
    assert running.wait(60) == 0
    assert browser.execute_script("return window.opened") is True
    assert "chosen from" in browser.find_element("css selector", ".lead").text
    assert browser.get_log("browser") == []
    keep(tmp_path / "running.png")


def keep(path: Path) -> None:
    """LVD_SCREENSHOTS names a folder for people who want to look."""
    if folder := os.environ.get("LVD_SCREENSHOTS"):
        shutil.copy(path, folder)


def test_a_shard_shows_its_pictures(browser: Any, finished: Served, tmp_path: Path) -> None:
    show(browser, 1240, 1000)
    browser.get(f"{finished.url}/runs/photographs")
    browser.find_element("link text", "000000.tar").click()
    widths = pictures(browser)
    assert len(widths) == 60 or len(widths) > 20
    assert min(widths) > 0
    browser.save_screenshot(tmp_path / "shard.png")
    keep(tmp_path / "shard.png")
    browser.find_element("css selector", ".grid a").click()
    assert browser.find_element("id", "decision").get_attribute("data-decision") == "selected"
    assert min(pictures(browser)) > 0
    assert browser.get_log("browser") == []


def looked_up(browser: Any, service: Served, key: str) -> Any:
    """Types a key, takes the first answer by keyboard alone, and gives the page's decision."""
    from selenium.webdriver.common.keys import Keys

    browser.get(f"{service.url}/runs/photographs")
    field = browser.find_element("id", "q")
    field.send_keys(key, Keys.ENTER)
    until(browser, "document.querySelector('.found .tile a') !== null", bool, 30)
    browser.find_element("css selector", ".found .tile a").send_keys(Keys.ENTER)
    return until(browser, "document.querySelector('#decision')?.dataset.decision", bool, 30)


def test_the_story_of_a_kept_a_duplicate_and_a_rejected_image(
    browser: Any, finished: Served, folder: Path, tmp_path: Path
) -> None:
    show(browser, 1240, 1000)
    curated = sorted((folder / "images" / "curated").iterdir())[0].name
    assert looked_up(browser, finished, curated) == "selected"
    assert "What it brought as a query" in browser.page_source
    lineage = (folder / "runs" / "photographs" / "lineage" / "parts").glob("*.parquet")
    rows = [row for path in lineage for row in pq.read_table(path).to_pylist()]
    duplicate = next(row["key"] for row in rows if row["decision"] == "duplicate")
    assert looked_up(browser, finished, duplicate) == "duplicate"
    assert "Its duplicate group" in browser.page_source
    assert min(pictures(browser)) > 0
    browser.save_screenshot(tmp_path / "duplicate.png")
    keep(tmp_path / "duplicate.png")
    assert looked_up(browser, finished, "broken-truncated.jpg") == "rejected"
    assert "truncated" in browser.find_element("css selector", ".pairs code").text
    assert browser.get_log("browser") == []


def test_an_upload_is_searched_for(browser: Any, finished: Served, folder: Path) -> None:
    show(browser, 1240, 1000)
    browser.get(f"{finished.url}/runs/photographs")
    curated = sorted((folder / "images" / "curated").iterdir())[0]
    browser.find_element("id", "image").send_keys(str(curated))
    browser.find_element("css selector", "form[enctype] button").click()
    until(browser, "document.querySelectorAll('.tiles .tile').length", lambda n: n > 10, 60)
    first = browser.find_element("css selector", ".tiles .tile figcaption")
    assert first.get_attribute("title") == curated.name
    assert first.text == "cosine 1.000"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1240, 390, 320])
def test_it_fits_screens_large_and_small(
    browser: Any, finished: Served, tmp_path: Path, width: int, scheme: str
) -> None:
    show(browser, width, 900, scheme)
    for name, path in {"run": "/runs/photographs", "runs": "/", "login": "/login"}.items():
        browser.get(finished.url + path)
        wide = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, path
        shot = tmp_path / f"{name}-{width}-{scheme}.png"
        browser.save_screenshot(shot)
        keep(shot)
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    dark = sum(int(x) for x in ground.removeprefix("rgb(").rstrip(")").split(",")) < 200
    assert dark == (scheme == "dark")


def test_the_keyboard_reaches_everything_visibly(browser: Any, finished: Served) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    show(browser, 1240, 900)
    browser.get(f"{finished.url}/runs/photographs")
    reached = []
    for _ in range(20):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        at = browser.switch_to.active_element
        reached.append(at.text or at.get_attribute("id"))
        assert at.value_of_css_property("outline-style") != "none", reached
        if reached[-1] == "As it was run, with every default":
            break
    assert reached[0] == "Skip to the content"
    assert {"LVD", "000000.tar", "q", "Find", "image"} <= set(reached), reached


def test_the_keyboard_keeps_its_place_when_the_page_is_renewed(
    browser: Any, finished: Served
) -> None:
    browser.get(finished.url)
    browser.execute_script("(window.card = document.querySelector('.card')).focus()")
    until(browser, "document.body.contains(window.card)", lambda there: not there, 30)
    assert browser.execute_script("return document.activeElement.className") == "card"


STALE = "!document.getElementById('stale').hidden"


def test_the_page_says_when_what_it_shows_may_be_old(browser: Any, tmp_path: Path) -> None:
    with served(tmp_path) as service:
        browser.get(service.url)
        port = str(service.address[1])
        assert not browser.execute_script(f"return {STALE}")
    until(browser, STALE, bool, 30)
    assert "could not be renewed" in browser.find_element("id", "stale").text
    with served(tmp_path, "--port", port):
        until(browser, STALE, lambda stale: not stale, 30)


def test_one_part_that_is_renewed_does_not_speak_for_another(browser: Any, tmp_path: Path) -> None:
    """The list of shards can't be asked for; the rest of the page can, every two seconds."""
    (tmp_path / "run" / "status").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text("name: waits\n")
    with served(tmp_path) as service:
        browser.get(f"{service.url}/runs/run")
        browser.execute_cdp_cmd("Network.enable", {})
        browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/shards?*"]})
        until(browser, STALE, bool, 30)
        renewed = "addEventListener('htmx:afterSwap', () => { window.renewed = true; })"
        browser.execute_script(f"window.renewed = false; document.{renewed}")
        until(browser, "window.renewed", bool, 30)
        assert browser.execute_script(f"return {STALE}")
        browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
        until(browser, STALE, lambda stale: not stale, 30)
