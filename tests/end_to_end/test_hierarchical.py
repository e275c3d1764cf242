"""A balanced draw from a pool in which one kind of picture is nearly all there is."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from finished import counts, final_files
from PIL import Image
from workbench import Project, picture

from curation.cli import main

COLOURS = {"red": (230, 30, 30), "green": (30, 220, 40), "blue": (20, 40, 235)}
SIZES = {"red": 60, "green": 9, "blue": 5}
BALANCED = {"hierarchical": {"levels": [6, 3], "target_size": 12}}


@pytest.fixture
def coloured(project: Callable[..., Project]) -> Project:
    """74 pictures of three colours; the curated pictures show none of them."""
    dedup = {"min_cosine": 0.9999}  # the copy descriptor sees little but the colour
    work = project(pool=[], curated=range(100, 104), cluster={"k": 15}, dedup=dedup)
    seed = 0
    for colour, size in SIZES.items():
        for _ in range(size):
            seed += 1
            whole = Image.new("RGB", (96, 96), COLOURS[colour])
            path = work.folder / "pool" / f"{colour}-{seed:02d}.png"
            Image.blend(whole, picture(seed), 0.25).save(path)
    return work


def chosen(work: Project) -> dict[str, list[dict[str, Any]]]:
    """The pool's selected images with their reasons."""
    rows = [row for row in work.lineage() if row["source"] == "pool"]
    return {row["key"]: row["retrieved_by"] for row in rows if row["decision"] == "selected"}


def test_every_kind_is_drawn_as_often_and_the_story_says_how(
    coloured: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    coloured.recipe["sources"]["curated"]["wanted"]["retrieve"] = [BALANCED]
    assert coloured.run() == 0
    found = chosen(coloured)
    assert Counter(key.split("-")[0] for key in found) == {"red": 4, "green": 4, "blue": 4}
    for reasons in found.values():
        (reason,) = reasons
        assert (reason["set"], reason["how"], reason["query_id"]) == (
            "wanted",
            "hierarchical",
            None,
        )
        assert 0.5 < reason["cosine"] <= 1.001
    capsys.readouterr()
    assert main(["why", str(coloured.run_folder), next(iter(found))]) == 0
    said = capsys.readouterr().out
    assert "selected: selected_by wanted:hierarchical" in said
    assert "by wanted hierarchical cosine" in said
    (mode,) = counts(coloured.run_folder, "retrieve")["modes"]
    assert (mode["asked"], mode["images"]) == (12, 12)
    assert [level["clusters"] for level in mode["levels"]] == [15, 6, 3]
    top = mode["levels"][-1]
    assert top["pool_evenness"] < 0.7
    assert top["drawn_evenness"] == 1


def test_it_stands_beside_other_modes_and_does_not_change_with_them(coloured: Project) -> None:
    curated = coloured.recipe["sources"]["curated"]["wanted"]
    curated["retrieve"] = [BALANCED]
    assert coloured.run() == 0
    alone = set(chosen(coloured))
    curated["retrieve"] = ["as_is", {"sample": {"k": 2}}, BALANCED]
    assert coloured.run() == 0
    both = chosen(coloured)
    ways = {key: {reason["how"] for reason in reasons} for key, reasons in both.items()}
    assert {key for key, how in ways.items() if "hierarchical" in how} == alone
    assert {how for found in ways.values() for how in found} == {"sample", "hierarchical"}


def test_a_pool_smaller_than_what_is_asked_for_comes_whole(coloured: Project) -> None:
    whole = {"hierarchical": {"levels": 2, "target_size": 1000}}
    coloured.recipe["sources"]["curated"]["wanted"]["retrieve"] = [whole]
    assert coloured.run() == 0
    kept = counts(coloured.run_folder, "dedup")["kept"]
    assert len(chosen(coloured)) == kept


def test_another_size_or_seed_makes_another_draw_and_the_old_one_comes_back(
    coloured: Project,
) -> None:
    curated = coloured.recipe["sources"]["curated"]["wanted"]
    curated["retrieve"] = [BALANCED]
    assert coloured.run() == 0
    first = final_files(coloured.run_folder)
    table = Path(coloured.run_folder, "retrieve", "hierarchy", "wanted.parquet")
    assert sum(pq.read_table(table)["quota"].to_pylist()) == 3 * 12
    assert coloured.run("--ray", "off", "--set", "seed=1") == 0
    assert final_files(coloured.run_folder)["shards/manifest.json"] != first["shards/manifest.json"]
    curated["retrieve"] = [{"hierarchical": {"levels": [6, 3], "target_size": 6}}]
    assert coloured.run() == 0
    assert len(chosen(coloured)) == 6
    curated["retrieve"] = [BALANCED]
    assert coloured.run() == 0
    assert final_files(coloured.run_folder) == first
