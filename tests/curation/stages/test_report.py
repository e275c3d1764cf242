"""The report of small real runs: its numbers against the lineage, its page in a real browser."""

import base64
import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from workbench import Models, Project, picture, write_pictures

from curation.cli import main
from curation.images.decode import Limits
from curation.runtime.events import Events
from curation.runtime.executor import InProcessExecutor
from curation.runtime.manifest import read_report
from curation.runtime.store import open_store
from curation.stages import report
from curation.stages.report_examples import THUMBNAIL_BYTES, Showing, thumbnail
from curation.stages.report_facts import binned, histogram, median

HOSTILE = "<script>alert(1)</script>\"'&{{7*7}}.jpg"  # a folder `<script>alert(1)<` with a file
ALL_MODES = [
    "as_is",
    {"sample": {"k": 4}},
    {"cluster": {"per_cluster": 3, "min_queries": 1}},
    {"hierarchical": {"levels": 2, "target_size": 9}},
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Project:
    """A run with duplicates, broken and hostile images, an evaluation image and all modes."""
    folder = tmp_path_factory.mktemp("finished")
    pool = folder / "pool"
    write_pictures(pool, range(60))
    write_pictures(folder / "curated", range(100, 112))
    write_pictures(folder / "holdout", [200])
    for seed, size in ((3, 300), (4, 200)):
        picture(seed, size, size).save(pool / f"copy-of-{seed}.jpg", quality=90)
    shutil.copy(pool / "00005.jpg", pool / "same-bytes.jpg")
    picture(200, 150, 150).save(pool / "leaked.jpg")
    write_hostile(pool, 300)
    (pool / "<b>broken<!--.jpg").write_bytes(b"not an image")
    picture(1, 8, 8).save(pool / "tiny.png")
    recipe = {
        "name": "test",
        "output": str(folder / "run"),
        "sources": {
            "pool": [{"uri": str(pool)}],
            "curated": {"wanted": {"uri": str(folder / "curated"), "retrieve": ALL_MODES}},
            "holdout": {"test": {"uri": str(folder / "holdout")}},
        },
        "encoder": {"model": "test_vit", "weights": str(models.encoder)},
        "copy_descriptor": {"weights": str(models.descriptor)},
        "dedup": {"min_cosine": 0.95, "holdout_min_cosine": 0.9},
        "cluster": {"k": 3},
        "resources": {"part_images": 16},
    }
    work = Project(folder, recipe)
    assert work.run() == 0
    return work


def write_hostile(folder: Path, seed: int) -> None:
    path = folder / HOSTILE
    path.parent.mkdir()
    picture(seed).save(path)


def facts_of(work: Project) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((work.run_folder / "report/report.json").read_text())
    return facts


def page_of(work: Project) -> str:
    return (work.run_folder / "report/report.html").read_text()


def test_the_funnel_adds_up_and_agrees_with_the_lineage(finished: Project) -> None:
    funnel, rows = facts_of(finished)["funnel"], finished.lineage()
    pool = [row["decision"] for row in rows if row["source"] == "pool"]
    assert funnel["pool images"] == len(pool) == 67
    assert funnel["rejected"] == pool.count("rejected") == 2
    assert funnel["duplicates"] == pool.count("duplicate") == 3
    assert funnel["near evaluation"] == pool.count("near_holdout") == 1
    assert funnel["pool images"] - funnel["rejected"] == funnel["usable"]
    assert funnel["usable"] - funnel["duplicates"] - funnel["near evaluation"] == funnel["kept"]
    assert funnel["written"] == funnel["retrieved"] + funnel["curated as is"]
    assert funnel["written"] == sum(row["decision"] == "selected" for row in rows)


def test_the_composition_accounts_for_every_selected_image_once(finished: Project) -> None:
    facts = facts_of(finished)
    rows, total = facts["composition"]["rows"], facts["composition"]["total"]
    selected = [row for row in finished.lineage() if row["decision"] == "selected"]
    assert [row["how"] for row in rows] == ["as_is", "sample", "cluster", "hierarchical"]
    names = ["as is", "sample 4", "cluster, 3 each", "hierarchical, 9"]
    assert [row["retrieval"] for row in rows] == names
    assert sum(row["final"] for row in rows) == total["final"] == len(selected)
    assert sum(row["retrieved"] for row in rows) == total["retrieved"]
    assert total["retrieved"] == sum(len(row["retrieved_by"]) for row in selected)
    assert total["images"] == 12
    assert rows[1]["retrieved"] == 48
    cosines = facts["similarity"]["retrieved"]
    assert sum(cosines["counts"]) == cosines["total"] == 48


def test_the_balance_of_a_hierarchical_draw_is_told_by_level(finished: Project) -> None:
    balance = facts_of(finished)["balance"]
    assert [(row["set"], row["level"], row["clusters"]) for row in balance] == [
        ("wanted", 1, 3),
        ("wanted", 2, 2),
    ]
    assert balance[1]["drawn_evenness"] > 0.99 > balance[1]["pool_evenness"]
    assert "Balance of the hierarchical draws" in page_of(finished)


def test_the_examples_are_true(finished: Project) -> None:
    facts, rows = facts_of(finished), finished.lineage()
    rows.sort(key=lambda row: row["decision"] == "selected")  # of equal bytes, the one that is in
    by_id = {row["id"]: row for row in rows}
    assert len(facts["gallery"]) == 8
    for query in facts["gallery"]:
        assert query["key"] == by_id[query["id"]]["key"]
        assert len(query["neighbours"]) == 4
        cosines = [near["cosine"] for near in query["neighbours"]]
        assert cosines == sorted(cosines, reverse=True)
        for near in query["neighbours"]:
            reasons = by_id[near["id"]]["retrieved_by"]
            mine = [one for one in reasons if one["query_id"] == query["id"]]
            assert mine[0]["cosine"] == pytest.approx(near["cosine"], abs=1e-4)
    groups = {frozenset(one["key"] for one in g["images"]) for g in facts["duplicates"]["groups"]}
    copies = [{"00003.jpg", "copy-of-3.jpg"}, {"00004.jpg", "copy-of-4.jpg"}]
    assert groups >= {frozenset(pair) for pair in [*copies, {"00005.jpg", "same-bytes.jpg"}]}
    for group in facts["duplicates"]["groups"]:
        stays = [image["decision"] for image in group["images"]].count("kept")
        tainted = "holdout" in {image["source"] for image in group["images"]}
        assert tainted == ("leaked.jpg" in {image["key"] for image in group["images"]})
        assert stays == (0 if tainted else 1)
    clusters = facts["clusters"]
    assert sum(size for _, size in clusters["curve"]) == facts["funnel"]["kept"]
    assert all(len(one["images"]) == min(6, one["size"]) for one in clusters["examples"])


def test_rejections_searches_times_and_models_are_reported(finished: Project) -> None:
    facts = facts_of(finished)
    assert {(one["reason"], one["images"]) for one in facts["rejections"]} == {
        ("not_an_image", 1),
        ("too_small", 1),
    }
    keys = {one["key"] for reason in facts["rejections"] for one in reason["examples"]}
    assert keys == {"<b>broken<!--.jpg", "tiny.png"}
    assert [one["recall"] for one in facts["searches"]] == [1.0, 1.0, 1.0]
    assert [row["stage"] for row in facts["timings"]][:2] == ["ingest", "embed"]
    assert facts["models"]["thresholds"]["dedup.min_cosine"] == 0.95
    assert facts["models"]["copy_descriptor"]["fallback"] is False
    assert facts["notices"] == []
    manifest = json.loads((finished.run_folder / "shards/manifest.json").read_text())
    assert facts["manifest"]["hash"] == manifest["hash"]
    assert manifest["hash"] in page_of(finished)


def test_the_page_is_self_contained_and_hostile_keys_are_text(finished: Project) -> None:
    page = page_of(finished)
    assert len(page.encode()) < 2_000_000
    sources = re.findall(r'(?:src|href|action|data)\s*=\s*"([^"]*)"', page)
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    for forbidden in ("<script", "<b>broken", "<!--", "@import", "url(", "<link", "<iframe"):
        assert forbidden not in page.replace("<!doctype", ""), forbidden
    assert "&lt;b&gt;broken&lt;!--.jpg" in page
    assert "default-src 'none'" in page


def test_a_hostile_key_is_escaped_where_it_is_shown(project: Callable[..., Project]) -> None:
    work = project(pool=range(6), curated=[100])
    write_hostile(work.folder / "curated", 101)
    assert work.run() == 0
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page_of(work)
    assert "<script" not in page_of(work)
    assert "{{7*7}}" in page_of(work)


def test_the_same_run_gives_the_same_report(finished: Project) -> None:
    facts, page = facts_of(finished), page_of(finished)
    assert main(["report", str(finished.run_folder)]) == 0
    assert facts_of(finished) == facts
    assert page_of(finished) == page


def test_sources_that_are_gone_or_changed_leave_placeholders(
    project: Callable[..., Project],
) -> None:
    work = project(pool=range(6), curated=range(100, 103))
    assert work.run() == 0
    before, queries = facts_of(work), sorted((work.folder / "curated").iterdir())
    queries[0].unlink()
    picture(999).save(queries[1])
    queries[2].write_bytes(b"")
    write_again(work)
    facts, page = facts_of(work), page_of(work)
    assert facts["funnel"] == before["funnel"]
    reasons = {Path(query["key"]).stem: query["unavailable"] for query in facts["gallery"]}
    changed = "it has changed since it was embedded"
    assert reasons == {"00100": "no such file", "00101": changed, "00102": changed}
    assert page.count(">source unavailable<") == 3
    assert "unavailable" not in json.dumps(facts["gallery"][0]["neighbours"])


def write_again(work: Project) -> None:
    """The report stage alone: `curate report` would notice that the sources have changed."""
    store = open_store(str(work.run_folder))
    embedded = read_report(store, "embed")
    assert embedded is not None
    recipe = (work.run_folder / "recipe.yaml").read_text()
    cfg = report.ReportConfig("test", recipe, embedded.counts["embedding"], 0)
    report.run(cfg, "again", store, InProcessExecutor(), Events(store))


def test_images_in_archives_have_thumbnails(project: Callable[..., Project]) -> None:
    work = project(pool=[], curated=[100])
    files = write_pictures(work.folder / "loose", range(8))
    with tarfile.open(work.folder / "pool.tar", "w") as tar:
        for path in files:
            tar.add(path, path.name)
    data = [path.read_bytes() for path in write_pictures(work.folder / "rows", range(20, 28))]
    pq.write_table(pa.table({"image": data}), work.folder / "pool.parquet", row_group_size=3)
    work.recipe["sources"]["pool"] = [
        {"uri": str(work.folder / name)} for name in ("pool.tar", "pool.parquet")
    ]
    work.recipe["cluster"]["k"] = 2
    assert work.run() == 0
    facts = facts_of(work)
    shown = [image for one in facts["clusters"]["examples"] for image in one["images"]]
    assert {image["key"].partition("-")[0] for image in shown} >= {"row"}
    assert any(image["key"].endswith(".jpg") for image in shown)
    assert "unavailable" not in json.dumps(facts)


def test_a_run_without_queries_has_no_gallery(project: Callable[..., Project]) -> None:
    work = project(pool=range(6), curated=[100])
    work.recipe["sources"]["curated"]["wanted"]["retrieve"] = ["as_is"]
    assert work.run() == 0
    facts = facts_of(work)
    assert facts["gallery"] == []
    assert facts["similarity"] == {"retrieved": None, "duplicate_links": None}
    assert facts["composition"]["total"] == {"retrieved": 1, "final": 1, "images": 1}
    assert "no cosines" in page_of(work)


def test_the_stand_ins_are_named(project: Callable[..., Project]) -> None:
    work = project(pool=range(6), curated=[100, 101], encoder={"model": "lvd_demo"})
    work.recipe["copy_descriptor"] = {"weights": "builtin"}
    assert work.run() == 0
    facts = facts_of(work)
    assert len(facts["notices"]) == 2
    assert "not SSCD" in page_of(work)
    assert "demo encoder" in page_of(work)


def test_noise_makes_small_thumbnails() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 900, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    uri = thumbnail(file.getvalue(), Showing(Limits(32, 10**8, 10**8, 10), None))
    small = Image.open(io.BytesIO(data := base64.b64decode(uri.partition(",")[2])))
    assert len(data) <= THUMBNAIL_BYTES
    assert small.size == (176, 117)


def test_histograms_keep_every_value() -> None:
    cosines = np.array([1.0004, 1.0, 0.99, 0.985, 0.5, -1.0], np.float32)
    counts = binned(cosines)
    data = histogram(counts)
    assert data is not None
    assert counts.sum() == data["total"] == 6
    assert data["low"] == -1.0
    assert data["low"] + data["width"] * len(data["counts"]) == pytest.approx(1.0)
    assert median(counts) == 0.99
    narrow = histogram(binned(np.array([0.999], np.float32)))
    assert narrow is not None
    assert (narrow["low"], narrow["counts"]) == (0.8, [0] * 9 + [1])
    assert histogram(np.zeros(100, np.int64)) is None


@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_opens_in_a_browser(browser: Any, finished: Project, width: int) -> None:
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get_log("browser")  # of pages that it showed before
    browser.get((finished.run_folder / "report/report.html").as_uri())
    sizes = browser.execute_script("return [...document.images].map(image => image.naturalWidth)")
    assert len(sizes) > 40
    assert min(sizes) > 0
    assert browser.get_log("browser") == []
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
        ".filter(name => !name.startsWith('data:'))"
    )
    assert loaded == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return document.scripts.length") == 0
