"""A changed recipe or source runs only what it touches: proved by counts, not by clocks."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from finished import counts, final_files
from workbench import Project, write_pictures

from curation.cli import main

ALL = ("ingest", "embed", "dedup", "cluster", "retrieve", "shards", "lineage", "report")


def finished_at(work: Project) -> dict[str, int]:
    return {s: (work.run_folder / s / "done.json").stat().st_mtime_ns for s in ALL}


def ran(work: Project) -> list[str]:
    """Runs the recipe; the stages that did something."""
    before = finished_at(work)
    assert work.run() == 0
    after = finished_at(work)
    return [stage for stage in ALL if after[stage] != before[stage]]


def fresh(work: Project) -> dict[str, object]:
    """The files of the same recipe run from nothing."""
    kept = work.run_folder.with_name("kept")
    shutil.move(work.run_folder, kept)
    assert work.run() == 0
    files = final_files(work.run_folder)
    shutil.rmtree(work.run_folder)
    shutil.move(kept, work.run_folder)
    return files


def test_a_setting_runs_its_stage_and_those_after_it(project: Callable[..., Project]) -> None:
    work = project()
    assert work.run() == 0
    assert ran(work) == []
    work.recipe["sources"]["curated"]["wanted"]["retrieve"] = [{"sample": {"k": 2}}]
    assert ran(work) == ["retrieve", "shards", "lineage", "report"]
    work.recipe["shards"] = {"images_per_shard": 5}
    assert ran(work) == ["shards", "lineage", "report"]
    work.recipe["dedup"] = {"min_cosine": 0.9, "holdout_min_cosine": 0.9}
    assert ran(work) == list(ALL[2:])
    work.recipe["cluster"] = {"k": 4}
    assert ran(work) == ["cluster", "retrieve", "shards", "lineage", "report"]
    work.recipe["resources"]["workers"] = 1
    assert ran(work) == ["report"]
    assert counts(work.run_folder, "embed")["computed"] == 4
    assert final_files(work.run_folder) == fresh(work)


def test_an_old_recipe_comes_back_without_embedding(project: Callable[..., Project]) -> None:
    work = project()
    assert work.run() == 0
    whole = final_files(work.run_folder)
    work.recipe["dedup"] = {"min_cosine": 0.8, "holdout_min_cosine": 0.8}
    assert work.run("--ray", "off", "--until", "dedup") == 0
    work.recipe["dedup"] = {"min_cosine": 0.95, "holdout_min_cosine": 0.9}
    assert ran_from(work) == 2
    assert final_files(work.run_folder) == whole


def ran_from(work: Project) -> int:
    """Runs the recipe; the number of the first stage that did something."""
    done = work.run_folder / "embed" / "done.json"
    before = done.stat().st_mtime_ns
    assert work.run() == 0
    return 1 if done.stat().st_mtime_ns != before else 2


def test_a_new_source_embeds_only_itself(project: Callable[..., Project], tmp_path: Path) -> None:
    work = project()
    assert work.run() == 0
    write_pictures(tmp_path / "more", range(60, 70))
    work.recipe["sources"]["pool"].insert(0, {"uri": str(tmp_path / "more")})
    assert ran(work) == list(ALL)
    found = counts(work.run_folder, "embed")
    assert (found["computed"], found["reused"]) == (1, 4)
    work.recipe["sources"]["holdout"] = {"test": {"uri": str(tmp_path / "pool")}}
    work.recipe["sources"]["pool"].pop()
    assert work.run() == 0
    found = counts(work.run_folder, "embed")
    assert (found["computed"], found["reused"]) == (0, 5)  # the same images in another role
    assert final_files(work.run_folder) == fresh(work)


def test_a_file_more_embeds_only_its_part(project: Callable[..., Project]) -> None:
    work = project()
    assert work.run() == 0
    write_pictures(work.folder / "pool", [90])
    assert ran(work) == list(ALL)
    found = counts(work.run_folder, "embed")
    assert (found["computed"], found["reused"]) == (1, 3)
    assert final_files(work.run_folder) == fresh(work)


def test_retry_does_again_only_what_failed(project: Callable[..., Project]) -> None:
    work = project(pool=range(40))
    link = work.folder / "pool" / "99999.jpg"
    link.symlink_to(work.folder / "later.jpg")
    assert work.run() == 0
    assert json.loads((work.run_folder / "embed/done.json").read_text())["counts"]["faults"] == {
        "unreadable": 1
    }
    write_pictures(work.folder, [88])
    os.rename(work.folder / "00088.jpg", work.folder / "later.jpg")
    assert main(["retry", str(work.run_folder), "--ray", "off"]) == 0
    found = counts(work.run_folder, "embed")
    assert (found["computed"], found["reused"], found["faults"]) == (1, 3, {})
    assert final_files(work.run_folder) == fresh(work)
