"""The same seed gives the same bytes, whatever does the work."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from finished import final_files, manifest_hash
from workbench import Project, picture


def busy(project: Callable[..., Project], **sections: Any) -> Project:
    """A run with copies, a holdout, hashes, every way to retrieve, searches by inverted files."""
    work = project(pool=range(36), curated=range(100, 106), holdout=[200, 5], **sections)
    for seed in (3, 9, 14):
        picture(seed, 200, 160).save(work.folder / "pool" / f"copy-{seed}.jpg", quality=85)
    draw = {"cluster": {"per_cluster": 3, "min_queries": 1}}
    backfill = {"sample": {"k": 3, "collisions": "backfill"}}
    balanced = {"hierarchical": {"levels": [3, 2], "target_size": 11}}
    work.recipe["sources"]["curated"]["wanted"]["retrieve"] = ["as_is", backfill, draw, balanced]
    work.recipe["search"] = {"exact_below": 0, "target_recall": 0.9}
    work.recipe["safety"] = {"phash": {"mode": "drop", "bits": 2}}
    return work


def rerun(work: Project, *options: str) -> dict[str, Any]:
    """All files of a run that starts from nothing."""
    shutil.rmtree(work.run_folder, ignore_errors=True)
    assert work.run(*options) == 0
    return final_files(work.run_folder)


def test_two_runs_give_the_same_files_and_another_seed_does_not(
    project: Callable[..., Project],
) -> None:
    work = busy(project)
    first, was = rerun(work), manifest_hash(work.run_folder)
    assert rerun(work) == first
    work.recipe["seed"] = 1
    rerun(work)
    assert manifest_hash(work.run_folder) != was


def test_the_number_of_maths_threads_changes_nothing(
    project: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = busy(project)
    torch.set_num_threads(1)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    alone = rerun(work)
    torch.set_num_threads(4)
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert rerun(work) == alone


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_one_worker_four_workers_and_no_ray_give_the_same_hash(
    project: Callable[..., Project],
) -> None:
    work = busy(project)
    alone = rerun(work, "--ray", "off")
    for workers in (1, 4):
        files = rerun(work, "--ray", "local", "--set", f"resources.workers={workers}")
        assert files.keys() == alone.keys()
        different = {name.split("/")[0] for name in alone if files[name] != alone[name]}
        assert different == {"recipe.yaml", "report"}  # they say how many workers there were
