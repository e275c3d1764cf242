"""Sources that change, vanish or are of no use while a run goes on; and the failure budget."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from finished import counts, final_files
from workbench import Project, picture, write_pictures

from curation.stages import shards


def before_shards(monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]) -> None:
    """Does something once, when the run comes to its shards."""
    run = shards.run

    def changed(*given: Any) -> Any:
        monkeypatch.setattr(shards, "run", run)
        change()
        return run(*given)

    monkeypatch.setattr(shards, "run", changed)


def selected_file(work: Project) -> Path:
    """Taken as it is, so its bytes go to a shard."""
    return work.folder / "curated" / "00100.jpg"


def test_a_file_changed_before_the_shards(
    project: Callable[..., Project],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = project(pool=range(10))
    before_shards(monkeypatch, lambda: picture(999).save(selected_file(work)))
    assert work.run() == 1
    said = capsys.readouterr().err
    assert "00100.jpg has changed since it was embedded; run again" in said
    assert "Traceback" not in said
    assert work.run() == 0
    assert counts(work.run_folder, "embed")["reused"] == 1  # the pool


def test_a_file_deleted_before_the_shards(
    project: Callable[..., Project],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = project(pool=range(10))
    before_shards(monkeypatch, lambda: os.remove(selected_file(work)))
    assert work.run() == 1
    said = capsys.readouterr().err
    assert "00100.jpg: no such file" in said
    assert "Traceback" not in said
    assert work.run() == 0
    assert all(not row["key"].endswith("00100.jpg") for row in work.lineage())


def test_the_failure_budget(
    project: Callable[..., Project], capsys: pytest.CaptureFixture[str]
) -> None:
    work = project(pool=range(20), failures={"max_share": 0.1, "min_images": 2})
    for number in range(5):
        (work.folder / "pool" / f"bad-{number}.jpg").write_bytes(b"\xff\xd8\xff")
    assert work.run() == 1
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("curate:")]
    assert said == [
        "curate: embed: 5 of 31 images were rejected ({'corrupt': 5}), more than"
        " failures.max_share = 0.1 allows; finished parts are kept"
    ]
    work.recipe["failures"] = {"max_share": 0.5, "min_images": 2}
    assert work.run() == 0
    found = counts(work.run_folder, "embed")
    assert (found["computed"], found["reused"]) == (0, 3)


def test_retry_after_the_budget_stopped_the_run(project: Callable[..., Project]) -> None:
    from curation.cli import main

    work = project(pool=range(20), failures={"max_share": 0.05, "min_images": 0})
    for number in range(5):
        link = work.folder / "pool" / f"link-{number}.jpg"
        link.symlink_to(work.folder / "later" / f"{number:05d}.jpg")
    assert work.run() == 1
    write_pictures(work.folder / "later", range(300, 305))
    for path in (work.folder / "later").iterdir():
        path.rename(path.with_name(f"{int(path.stem) - 300:05d}.jpg"))
    assert main(["retry", str(work.run_folder), "--ray", "off"]) == 0
    found = counts(work.run_folder, "embed")
    assert found["faults"] == {}
    assert found["reused"] == 2


def test_one_image_in_the_pool(project: Callable[..., Project]) -> None:
    work = project(pool=[1])
    assert work.run() == 0
    assert [r["decision"] for r in work.lineage() if r["source"] == "pool"] == ["selected"]


@pytest.mark.parametrize("collisions", ["merge", "backfill"])
@pytest.mark.parametrize("exact_below", [0, 1000])
def test_k_larger_than_the_pool(
    project: Callable[..., Project], collisions: str, exact_below: int
) -> None:
    work = project(pool=range(5), search={"exact_below": exact_below})
    way = [{"sample": {"k": 20, "collisions": collisions}}]
    work.recipe["sources"]["curated"]["wanted"]["retrieve"] = way
    assert work.run() == 0
    assert {r["decision"] for r in work.lineage() if r["source"] == "pool"} == {"selected"}


@pytest.mark.parametrize("exact_below", [0, 1000])
def test_a_pool_of_one_image_many_times(project: Callable[..., Project], exact_below: int) -> None:
    work = project(pool=[1], search={"exact_below": exact_below})
    for number in range(12):
        picture(1).save(work.folder / "pool" / f"same-{number}.jpg")
        picture(1, 100 + number, 100).save(work.folder / "pool" / f"larger-{number}.jpg")
    assert work.run() == 0
    pool = [row for row in work.lineage() if row["source"] == "pool"]
    stays = [row["key"] for row in pool if row["decision"] == "selected"]
    assert stays == ["larger-11.jpg"]
    assert sum(row["decision"] == "duplicate" for row in pool) == 24


def test_a_pool_that_is_all_near_the_holdout(
    project: Callable[..., Project], capsys: pytest.CaptureFixture[str]
) -> None:
    work = project(pool=range(6), holdout=range(6))
    assert work.run() == 1
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("curate:")]
    assert said == [
        "curate: cluster: no pool image is left after dedup; there is nothing to cluster"
    ]


@pytest.mark.parametrize("role", ["pool", "curated"])
def test_not_one_usable_image(
    project: Callable[..., Project], capsys: pytest.CaptureFixture[str], role: str
) -> None:
    work = project(pool=range(6))
    for path in (work.folder / role).iterdir():
        path.write_bytes(b"no picture")
    assert work.run() == 1
    said = capsys.readouterr().err
    assert "not one image could be used" in said
    assert "Traceback" not in said


def test_scratch_files_of_a_killed_writer_go(project: Callable[..., Project]) -> None:
    work = project(pool=range(6))
    assert work.run() == 0
    whole = final_files(work.run_folder)
    for place in (".tmp-a", "embed/vectors/.tmp-b", "shards/.tmp-c", "status/.tmp-d"):
        (work.run_folder / place).write_bytes(b"half")
    assert work.run() == 0
    assert final_files(work.run_folder) == whole
    assert not list(work.run_folder.rglob(".tmp-*"))


def forget_checksums(work: Project) -> None:
    """As in a run that was embedded before there were any."""
    for path in (work.run_folder / "embed" / "images").iterdir():
        pq.write_table(pq.read_table(path).drop_columns("checksum"), path)


@pytest.mark.parametrize("changed", [False, True])
def test_a_run_embedded_without_checksums_is_told_by_the_images_ids(
    changed: bool,
    project: Callable[..., Project],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = project(pool=range(10))

    def change() -> None:
        forget_checksums(work)
        if changed:
            picture(999).save(selected_file(work))

    before_shards(monkeypatch, change)
    assert work.run() == int(changed)
    assert ("00100.jpg has changed since it was embedded" in capsys.readouterr().err) == changed
