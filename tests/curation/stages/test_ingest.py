"""Surveys: what counts as a source's files, what is passed over, and which fault is told."""

import gzip
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from workbench import write_pictures

from curation.runtime.events import Events
from curation.runtime.executor import InProcessExecutor
from curation.runtime.store import StoreError, open_store, read_table
from curation.stages import ingest
from curation.stages.fetch import Budget, Fetching
from curation.stages.tables import read_parts
from curation.web.fetcher import FetchConfig

NO_URLS = Fetching(
    FetchConfig("lvd", True, (), (), 1, 1, 0.0, 1.0, 0, 10**6),
    Budget(max_rejected_share=1, min_images=0),
)


def config(*uris: object, part_images: int = 10, form: str | None = None) -> ingest.IngestConfig:
    specs = [
        ingest.SourceSpec(f"sources.pool.{n}", "pool", "", str(uri), form)
        for n, uri in enumerate(uris)
    ]
    return ingest.IngestConfig(tuple(specs), part_images, NO_URLS)


def ingested(run: Path, cfg: ingest.IngestConfig) -> list[tuple[str, str | None]]:
    """(key, fault) of every member, in the order of the images' numbers."""
    store = open_store(str(run))
    events = Events(store)
    surveys = ingest.survey(cfg)
    with events.stage("ingest"):
        ingest.run(cfg, surveys, "f", store, InProcessExecutor(), events)
    found: list[tuple[str, str | None]] = []
    for part in read_parts(store):
        assert part.base == len(found)
        table = read_table(store, part.table, row_group=part.row_group)
        assert len(table) == part.rows <= max(cfg.part_images, 1)
        found += zip(table["key"].to_pylist(), table["fault"].to_pylist(), strict=True)
    return found


def tar_of(path: Path, images: list[Path]) -> None:
    with tarfile.open(path, "w") as tar:
        for image in images:
            tar.add(image, image.name)


def test_parts_are_bounded_and_numbered_in_order(tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "pool", range(25))
    tar_of(tmp_path / "x.tar", images)
    found = ingested(tmp_path / "run", config(tmp_path / "pool", tmp_path / "x.tar"))
    assert [key for key, _ in found] == [path.name for path in images] * 2


def test_sidecars_and_other_files_are_passed_over(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    images = write_pictures(pool / "00001", range(2))
    tar_of(pool / "00000.tar", images)
    for name in ("00000", "00001"):
        pq.write_table(pa.table({"url": ["x"]}), pool / f"{name}.parquet")
    (pool / "readme.txt").write_text("x")
    (survey,) = ingest.survey(config(pool))
    assert (survey.image_files, len(survey.archives), survey.ignored) == (2, 1, 3)


@pytest.mark.parametrize("form", ["folder", "webdataset", "parquet"])
def test_a_format_limits_a_source_to_it(tmp_path: Path, form: str) -> None:
    pool = tmp_path / "pool"
    images = write_pictures(pool, range(2))
    tar_of(pool / "x.tar", images)
    pq.write_table(pa.table({"jpg": [i.read_bytes() for i in images]}), pool / "y.parquet")
    found = [key for key, _ in ingested(tmp_path / "run", config(pool, form=form))]
    assert found == (
        ["row-000000000", "row-000000001"] if form == "parquet" else [*map_names(images)]
    )


def map_names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_one_archive_that_cannot_be_read_leaves_the_others_alone(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    images = write_pictures(tmp_path / "given", range(2))
    pool.mkdir()
    tar_of(pool / "b.tar", images)
    (pool / "a.tar.gz").write_bytes(gzip.compress(b"x"))
    (pool / "c.tar").symlink_to("nowhere")
    os.mkfifo(pool / "d.tar")
    faults = dict(ingested(tmp_path / "run", config(pool)))
    assert {key: fault and fault.split()[0] for key, fault in faults.items()} == {
        "a.tar.gz": "compressed_archive",
        "00000.jpg": None,
        "00001.jpg": None,
        "c.tar": "unreadable",
        "d.tar": "not_a_file",
    }


def test_an_archive_is_scanned_again_only_when_it_changes(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    images = write_pictures(tmp_path / "given", range(3))
    pool.mkdir()
    tar_of(pool / "a.tar", images[:2])
    tar_of(pool / "b.tar", images[:1])
    ingested(tmp_path / "run", config(pool))
    members = tmp_path / "run" / "ingest" / "members"
    before = {path.name: path.stat().st_mtime_ns for path in members.iterdir()}
    tar_of(pool / "b.tar", images[2:])
    assert [key for key, _ in ingested(tmp_path / "run", config(pool))] == map_names(images)
    after = {path.name: path.stat().st_mtime_ns for path in members.iterdir()}
    assert len(before.items() & after.items()) == 1
    assert len(after) == 2


def test_all_sources_that_cannot_be_used_are_told_together(tmp_path: Path) -> None:
    write_pictures(tmp_path / "good", range(1))
    (tmp_path / "empty").mkdir()
    uris = [tmp_path / "none", tmp_path / "good", tmp_path / "empty", "{3..1}.tar"]
    with pytest.raises(StoreError) as error:
        ingest.survey(config(*uris))
    lines = str(error.value).splitlines()
    assert [line.strip().split(": ")[0] for line in lines] == [
        "sources.pool.0.uri",
        "sources.pool.2.uri",
        "sources.pool.3.uri",
    ]


def test_a_range_with_a_missing_tar_is_told_not_skipped(tmp_path: Path) -> None:
    tar_of(tmp_path / "0.tar", write_pictures(tmp_path / "given", range(1)))
    with pytest.raises(StoreError, match=r"1\.tar: no such file"):
        ingest.survey(config(tmp_path / "{0..1}.tar"))
