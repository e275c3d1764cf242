"""The main job on small real images, from a folder to shards and back."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pandas
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


def test_other_tools_read_the_tables(project: Callable[..., Project]) -> None:
    work = project(pool=range(20))
    assert work.run() == 0
    vectors, lineage = work.run_folder / "embed" / "vectors", work.run_folder / "lineage" / "parts"
    query = f"select row, octet_length(semantic) from '{vectors}/*.parquet'"
    widths = duckdb.sql(query).fetchall()
    assert len(widths) == 26
    assert {width for _, width in widths} == {2 * 64}
    frame = pandas.concat(pandas.read_parquet(path) for path in sorted(vectors.glob("*.parquet")))
    rows = np.stack([np.frombuffer(value, np.float16) for value in frame["copy"]])
    np.testing.assert_allclose(np.linalg.norm(rows.astype(np.float32), axis=1), 1, atol=2e-3)
    count = f"select count(*) from '{lineage}/*.parquet' where decision = 'selected'"
    selected = sum(row["decision"] == "selected" for row in work.lineage())
    assert duckdb.sql(count).fetchall() == [(selected,)]


def test_the_index_of_a_shard_leads_to_the_bytes(project: Callable[..., Project]) -> None:
    work = project(pool=range(20))
    assert work.run() == 0
    manifest = json.loads((work.run_folder / "shards" / "manifest.json").read_text())
    assert manifest["images"] == sum(shard["images"] for shard in manifest["shards"])
    for shard in manifest["shards"]:
        data = (work.run_folder / "shards" / shard["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
        index = work.run_folder / "shards" / shard["name"].replace(".tar", ".index.parquet")
        for row in pandas.read_parquet(index).to_dict("records"):
            member = data[row["offset"] : row["offset"] + row["size"]]
            assert hashlib.sha256(member).hexdigest() == row["sha256"]
            if row["member"].endswith(".jpg"):
                assert row["key"] == row["sha256"]
