"""The main job on small real images, from a folder to shards and back."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import webdataset
from workbench import Project, picture


def test_every_selected_image_is_in_the_shards_once_with_its_own_bytes(
    project: Callable[..., Project],
) -> None:
    work = project(pool=range(40))
    picture(3, 300, 300).save(work.folder / "pool" / "larger-copy.jpg", quality=90)
    assert work.run() == 0
    rows = work.lineage()
    assert len(rows) == 47
    selected = {row["id"]: row for row in rows if row["decision"] == "selected"}
    shards = sorted(str(path) for path in (work.run_folder / "shards").glob("*.tar"))
    found = {}
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        key = sample["__key__"]
        assert key not in found
        assert hashlib.sha256(sample["jpg"]).hexdigest() == key
        found[key] = json.loads(sample["json"])
    assert set(found) == set(selected)
    for key, lineage in found.items():
        assert lineage["key"] == selected[key]["key"]
        assert lineage["retrieved_by"]
    by_key = {row["key"]: row for row in rows if row["source"] == "pool"}
    assert by_key["00003.jpg"]["decision"] == "duplicate"
    assert by_key["larger-copy.jpg"]["decision"] in ("selected", "not_retrieved")
    assert by_key["larger-copy.jpg"]["component"] == by_key["00003.jpg"]["component"] is not None


def test_a_second_run_computes_nothing(project: Callable[..., Project]) -> None:
    work = project()
    assert work.run() == 0
    before = {p: p.stat().st_mtime_ns for p in Path(work.run_folder).rglob("*.parquet")}
    assert work.run() == 0
    assert {p: p.stat().st_mtime_ns for p in Path(work.run_folder).rglob("*.parquet")} == before
