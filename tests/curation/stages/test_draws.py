"""Draws of several sets in one pass over the pool."""

from collections.abc import Callable

import pytest
from workbench import Project, write_pictures

from curation.stages import draws


def drawn(work: Project, name: str) -> set[str]:
    """Pool images that a set has drawn."""
    return {
        row["key"]
        for row in work.lineage()
        if row["source"] == "pool" and any(r["set"] == name for r in row["retrieved_by"] or [])
    }


def test_a_set_draws_the_same_beside_others_and_in_pieces(
    project: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = project(pool=range(60))
    write_pictures(work.folder / "more", range(200, 209))
    wanted = work.recipe["sources"]["curated"]["wanted"]
    wanted["retrieve"] = [{"cluster": {"per_cluster": 6, "min_queries": 1, "cap": 15}}]
    assert work.run() == 0
    alone = drawn(work, "wanted")
    assert len(alone) == 15
    more = {"cluster": {"per_cluster": 4, "min_queries": 2}}
    balanced = {"hierarchical": {"levels": [2], "target_size": 9}}
    work.recipe["sources"]["curated"]["more"] = {
        "uri": str(work.folder / "more"),
        "retrieve": [more, balanced],
    }
    assert work.run() == 0
    assert drawn(work, "wanted") == alone
    beside = drawn(work, "more")
    assert beside
    monkeypatch.setattr(draws, "CHUNK_IMAGES", 10)
    work.recipe["seed"] = 1  # other draws, and back: nothing is found done
    assert work.run() == 0
    assert drawn(work, "wanted") != alone
    work.recipe["seed"] = 0
    assert work.run() == 0
    assert drawn(work, "wanted") == alone
    assert drawn(work, "more") == beside
    assert not (work.run_folder / "retrieve" / "draws").exists() or not any(
        path.is_file() for path in (work.run_folder / "retrieve" / "draws").rglob("*")
    )
