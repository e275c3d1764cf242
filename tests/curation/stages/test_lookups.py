"""Images by id, group and query: what a scan of the lineage finds, in any number of files."""

from collections import defaultdict
from collections.abc import Callable

import pyarrow.parquet as pq
import pytest
from workbench import Project, picture

from curation.runtime.store import FileStore
from curation.schema import LOOKUPS, id_prefix, lookup_folder
from curation.service.lineage import LineageReader
from curation.service.runs import Run


def test_lookups_are_the_lineage_by_other_keys(
    project: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("curation.stages.lookups.GROUP_IMAGES", 32)
    monkeypatch.setattr("curation.stages.lookups.ROW_GROUP", 5)
    work = project(pool=range(60))
    for seed in range(8):
        picture(seed, 200, 200).save(work.folder / "pool" / f"again-{seed}.jpg", quality=90)
    assert work.run() == 0
    rows = work.lineage()
    wanted: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for row in rows:
        wanted["id"].add((id_prefix(row["id"]), row["image"]))
        if row["component"] is not None:
            wanted["component"].add((row["component"], row["image"]))
        for by in row["retrieved_by"]:
            if by["query_id"]:
                wanted["query"].add((id_prefix(by["query_id"]), row["image"]))
    for lookup in LOOKUPS:
        files = sorted((work.run_folder / lookup_folder(lookup)).glob("*.parquet"))
        assert len(files) == 3
        found = []
        for file in files:
            table = pq.read_table(file)
            pairs = list(zip(table["key"].to_pylist(), table["image"].to_pylist(), strict=True))
            assert pairs == sorted(pairs)
            found += pairs
        assert len(found) == len(wanted[lookup]) > 0
        assert set(found) == wanted[lookup]
    run = Run("run", "run", FileStore(str(work.run_folder)))
    reader = LineageReader()
    for row in rows:
        assert row["image"] in {image.image for image in reader.story(run, row["id"]).images}
        assert reader.first(run, row["id"][:16]).id == row["id"]
