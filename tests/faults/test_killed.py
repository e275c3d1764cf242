"""SIGKILL at any write of any stage, then the same command again: the same bytes, nothing twice."""

import io
import shutil
import tarfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finished import counts, final_files
from killing import Mortal
from workbench import Project, picture, write_pictures

STAGES = ("ingest", "embed", "dedup", "cluster", "retrieve", "shards", "lineage", "report")
# The folder of each stage's part files, and the end of their names.
PARTS = {
    "embed": "embed/vectors/*.parquet",
    "cluster": "cluster/assignments/*.parquet",
    "shards": "shards/*.index.parquet",
    "lineage": "lineage/parts/*.parquet",
}


def jpeg(seed: int) -> bytes:
    out = io.BytesIO()
    picture(seed).save(out, "JPEG")
    return out.getvalue()


def write_tar(path: Path, seeds: Iterable[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for seed in seeds:
            data = jpeg(seed)
            info = tarfile.TarInfo(f"{seed:05d}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def mortal(project: Callable[..., Project]) -> Mortal:
    """Every kind of source, search, draw and stage, in a run of a second or two."""
    work = project(pool=range(14), curated=range(100, 104), holdout=[200, 201])
    pool = work.folder
    picture(3, 200, 200).save(pool / "pool" / "larger-copy.jpg", quality=90)
    picture(200, 150, 150).save(pool / "pool" / "near-test.jpg", quality=90)
    (pool / "pool" / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    for number in range(2):
        write_tar(pool / "tars" / f"{number}.tar", range(20 + 5 * number, 26 + 5 * number))
    table = pa.table({"image": [jpeg(seed) for seed in range(50, 56)], "label": list(range(6))})
    pq.write_table(table, pool / "pool.parquet", row_group_size=3)
    write_pictures(pool / "curated", range(104, 106))
    recipe = work.recipe
    recipe["sources"]["pool"] += [{"uri": str(pool / "tars")}, {"uri": str(pool / "pool.parquet")}]
    backfill = {"sample": {"k": 3, "collisions": "backfill"}}
    draw = {"cluster": {"per_cluster": 4, "min_queries": 1}}
    balanced = {"hierarchical": {"levels": [3, 2], "target_size": 7}}
    recipe["sources"]["curated"]["wanted"]["retrieve"] = ["as_is", backfill, draw, balanced]
    recipe["search"] = {"exact_below": 0, "target_recall": 0.9}
    recipe["resources"] = {"part_images": 9}
    return Mortal(work)


def finished_parts(run: Path) -> dict[str, int]:
    """Part files of every stage that was begun but not completed."""
    return {
        stage: len(list(run.glob(pattern)))
        for stage, pattern in PARTS.items()
        if (run / stage / "started.json").exists() and not (run / stage / "done.json").exists()
    }


def states(mortal: Mortal) -> dict[str, dict[str, Any]]:
    """What a run that nothing disturbs has left when a stage is done, by the stage."""
    run, found = mortal.work.run_folder, {}
    for stage in STAGES:
        assert mortal.run(until=stage) == 0, mortal.log.read_text()
        found[stage] = final_files(run)
    return found


def check_killed(mortal: Mortal, kill_at: int, whole: dict[str, Any]) -> str:
    """Kills a fresh run at one point and checks the next; returns the stage that was killed."""
    shutil.rmtree(mortal.work.run_folder)
    assert mortal.run(kill_at) == -9
    at = begun(mortal.work.run_folder)
    check_resumed(mortal, kill_at, "report", whole)
    return at


def check_deaths(
    mortal: Mortal, points: Collection[int], undisturbed: dict[str, dict[str, Any]]
) -> set[str]:
    """Deaths of a run at many points; returns the stages that were killed.

    A dead run goes on until the stage is done: with the files that another run has there, all that
    follows is the same. The first to die in a stage goes on to the end.
    """
    seen: set[str] = set()
    for kill_at in mortal.die_at(points):
        at = begun(mortal.work.run_folder)
        until = at if at in seen else "report"
        check_resumed(mortal, kill_at, until, undisturbed[until])
        seen.add(at)
    return seen


def begun(run: Path) -> str:
    """The first stage that is not completed, or the last of all."""
    return next((stage for stage in STAGES if not (run / stage / "done.json").exists()), "report")


def check_resumed(mortal: Mortal, kill_at: int, until: str, expected: dict[str, Any]) -> None:
    """Runs again until a stage is done, and compares."""
    run = mortal.work.run_folder
    had = finished_parts(run)
    assert mortal.run(until=until) == 0, (kill_at, until, mortal.log.read_text())
    for stage, parts in had.items():
        assert counts(run, stage)["reused"] == parts, (kill_at, stage)
    found = final_files(run)
    assert found.keys() == expected.keys(), (kill_at, until)
    different = [name for name in expected if found[name] != expected[name]]
    assert not different, (kill_at, until, different)


def spread(points: list[str], wanted: int) -> list[int]:
    """The numbers of `wanted` points from the first to the last, evenly."""
    return sorted({1 + round(i * (len(points) - 1) / (wanted - 1)) for i in range(wanted)})


def test_killed_at_points_over_all_stages(mortal: Mortal) -> None:
    assert mortal.run() == 0, mortal.log.read_text()
    whole = final_files(mortal.work.run_folder)
    for kill_at in spread(mortal.points(), 3):
        check_killed(mortal, kill_at, whole)


def test_killed_in_the_union_find(mortal: Mortal) -> None:
    """Between the first blocks of edges, and after the last, when the holdout has joined."""
    assert mortal.run() == 0, mortal.log.read_text()
    whole = final_files(mortal.work.run_folder)
    joins = [at for at, kind in enumerate(mortal.points(), 1) if kind == "joined components"]
    assert len(joins) > 3
    for kill_at in (joins[0], joins[-1]):
        assert check_killed(mortal, kill_at, whole) == "dedup"


def test_killed_while_perceptual_hashes_are_compared(mortal: Mortal) -> None:
    mortal.work.recipe["safety"] = {"phash": {"mode": "drop"}}
    assert mortal.run() == 0, mortal.log.read_text()
    assert counts(mortal.work.run_folder, "embed")["phash_duplicates"] > 0
    whole = final_files(mortal.work.run_folder)
    points = mortal.points()
    for kind in ("joined components", "published embed"):  # the last of which is the marker
        assert check_killed(mortal, points.index(kind) + 1, whole) == "embed"


@pytest.mark.slow
@pytest.mark.parametrize("here_bytes", [0, 1 << 30])
def test_killed_between_and_within_iterations_of_kmeans(mortal: Mortal, here_bytes: int) -> None:
    """By workers (0), also between their totals, and in the driver: with the same bytes."""
    mortal.work.recipe["cluster"] = {"k": 5, "iterations": 4, "sample_per_centroid": 5}
    mortal.work.recipe["cluster"]["resample"] = 2
    mortal.rows = 7
    assert mortal.run() == 0, mortal.log.read_text()
    whole = final_files(mortal.work.run_folder)
    mortal.here_bytes = here_bytes
    shutil.rmtree(mortal.work.run_folder)
    assert mortal.run() == 0, mortal.log.read_text()
    assert final_files(mortal.work.run_folder) == whole
    points = list(enumerate(mortal.points(), 1))
    shutil.rmtree(mortal.work.run_folder)
    undisturbed = states(mortal)
    assert undisturbed["report"] == whole
    kinds = ["published cluster/fit/000/sample", "written cluster/fit/000"]
    kinds += ["published cluster/fit/000", "deleted cluster/fit/000"]
    by_workers = ["published cluster/fit/000/0001", "written cluster/fit/002/0001"]
    kinds += [] if here_bytes else by_workers
    kinds += ["published cluster/fit/001/near", "written cluster/fit/001/sample"]
    kinds += ["published cluster/fit/001", "deleted cluster/fit/001/near"]
    kinds += ["published cluster/fit/002/sample", "deleted cluster/fit/001/sample"]
    numbers = {kind: [number for number, point in points if point == kind] for kind in kinds}
    middles = {at[len(at) // 2] for at in numbers.values()}
    assert check_deaths(mortal, middles, undisturbed) == {"cluster"}


@pytest.mark.slow
@pytest.mark.parametrize("which", ["first", "last"])
def test_killed_at_every_kind_of_write(mortal: Mortal, which: str) -> None:
    """The first or the last point of every kind: before and after a rename, after a delete."""
    assert mortal.run() == 0, mortal.log.read_text()
    whole, points = final_files(mortal.work.run_folder), list(enumerate(mortal.points(), 1))
    shutil.rmtree(mortal.work.run_folder)
    undisturbed = states(mortal)
    assert undisturbed["report"] == whole
    first = {kind: number for number, kind in reversed(points)}
    last = {kind: number for number, kind in points}
    at_first, at_last = set(first.values()), set(last.values())
    wanted = at_first if which == "first" else at_last - at_first
    stages = check_deaths(mortal, wanted, undisturbed)
    assert which == "last" or stages == set(STAGES)


@pytest.mark.slow
def test_killed_again_and_again(mortal: Mortal) -> None:
    """Each new start gets a little further than the one before, and dies too."""
    assert mortal.run() == 0, mortal.log.read_text()
    whole = final_files(mortal.work.run_folder)
    shutil.rmtree(mortal.work.run_folder)
    starts = 0
    while (code := mortal.run(60)) != 0:
        assert code == -9
        starts += 1
        assert starts < 60
    assert starts > 3
    assert final_files(mortal.work.run_folder) == whole


@pytest.mark.slow
def test_a_recipe_edited_after_the_kill_gives_what_a_fresh_run_gives(mortal: Mortal) -> None:
    edited = {"min_cosine": 0.9, "holdout_min_cosine": 0.85}
    run, dedup = mortal.work.run_folder, mortal.work.recipe["dedup"]
    mortal.work.recipe["dedup"] = edited
    assert mortal.run() == 0, mortal.log.read_text()
    whole = final_files(run)
    for kill_at in spread(mortal.points(), 8):
        shutil.rmtree(run)
        mortal.work.recipe["dedup"] = dedup
        assert mortal.run(kill_at) == -9
        mortal.work.recipe["dedup"] = edited
        assert mortal.run() == 0, mortal.log.read_text()
        assert final_files(run) == whole, kill_at


@pytest.mark.slow
def test_killed_while_a_changed_recipe_clears_the_old_files_then_back_again(
    mortal: Mortal,
) -> None:
    assert mortal.run() == 0, mortal.log.read_text()
    run, per_shard = mortal.work.run_folder, {"images_per_shard": 5}
    whole, old = final_files(run), mortal.work.recipe["shards"]
    mortal.work.recipe["shards"] = per_shard
    shutil.copytree(run, run.with_name("copy"))
    assert mortal.run() == 0, mortal.log.read_text()
    for kill_at in spread(mortal.points(), 30)[:15]:
        shutil.rmtree(run)
        shutil.copytree(run.with_name("copy"), run)
        mortal.work.recipe["shards"] = per_shard
        assert mortal.run(kill_at) == -9
        mortal.work.recipe["shards"] = old
        assert mortal.run() == 0, (kill_at, mortal.log.read_text())
        assert final_files(run) == whole, kill_at
