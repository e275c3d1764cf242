"""Answers about a run, from its files alone: status, the story of one image, the funnel."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation import pipeline
from curation.images.sources import readable
from curation.runtime.manifest import read_report
from curation.runtime.status import stage_status
from curation.runtime.store import Store, StoreError, compression, read_table
from curation.schema import LINEAGE, REPORT_HTML, REPORT_JSON, lineage_path
from curation.stages.tables import Part, read_parts

ID_DIGITS = 8


def print_funnel(store: Store) -> None:
    """The funnel, and where the results are."""
    facts = json.loads(store.read(REPORT_JSON))
    print()
    for name, value in facts["funnel"].items():
        print(f"{name:>16} {value:>12,}")
    for reason, count in facts["stages"]["embed"]["faults"].items():
        print(f"{'rejected as':>16} {count:>12,}  {reason}")
    print(f"\nshards: {store.locate('shards')}\nreport: {store.locate(REPORT_HTML)}")


def print_status(store: Store) -> None:
    """One line a stage: its state, how far it is, what failed."""
    print(f"{'stage':<10}{'state':<10}{'done':>12}{'total':>12}  notes")
    for stage in pipeline.STAGES:
        status = stage_status(store, stage)
        done, total = status.get("done", ""), status.get("total", "")
        notes = status.get("message") or ""
        if status.get("failed_parts"):
            notes = f"{status['failed_parts']} failed parts; {notes}"
        print(f"{stage:<10}{status['state']:<10}{done:>12}{total:>12}  {notes}")


def print_story(store: Store, image: str) -> None:
    """Everything that is known of the images with this key or id. Raises StoreError for none."""
    rows = find(store, image)
    if not rows:
        raise StoreError(f"no image with key or id '{image}' in {store.uri}")
    for number, row in enumerate(rows):
        if number:
            print()
        where = row["source"] + (f" {row['set']}" if row["set"] else "")
        print(f"{row['key']}\n  id         {row['id']}\n  from       {row['uri']} ({where})")
        if row["width"]:
            print(f"  size       {row['width']} x {row['height']}, {row['bytes']:,} bytes")
        print(f"  decision   {row['decision']}: {row['reason']}")
        if row["component"] is not None:
            print(f"  duplicates group {row['component']}")
        for reason in row["retrieved_by"]:
            query = f" query {reason['query_id']}" if reason["query_id"] else ""
            cosine = "" if reason["cosine"] is None else f" cosine {reason['cosine']:.3f}"
            print(f"  retrieved  by {reason['set']} {reason['how']}{query}{cosine}")
        if row["shard"]:
            print(f"  shard      {store.locate('shards/' + row['shard'])}")


def find(store: Store, image: str) -> list[dict[str, Any]]:
    """Lineage rows whose key is `image`, ends with `/image`, or whose id begins with it."""
    image = readable(image)  # the command line may hold bytes that aren't UTF-8, as keys do
    rows: list[dict[str, Any]] = []
    for part in _lineage_parts(store):
        table = read_table(store, lineage_path(part.part))
        match = pc.or_(pc.equal(table["key"], image), pc.ends_with(table["key"], "/" + image))
        if len(image) >= ID_DIGITS:
            by_id = pc.fill_null(pc.starts_with(table["id"], image.lower()), False)
            match = pc.or_(match, by_id)
        rows += table.filter(match).to_pylist()
    return rows


def write_lineage(store: Store, path: str) -> int:
    """Writes the whole lineage as one Parquet file; returns its rows."""
    rows = 0
    try:
        with pq.ParquetWriter(path, LINEAGE, compression=compression(LINEAGE)) as writer:
            for part in _lineage_parts(store):
                table: pa.Table = read_table(store, lineage_path(part.part))
                writer.write_table(table)
                rows += len(table)
    except OSError as error:
        raise StoreError(f"--out {path}: {error.strerror or error}") from None
    return rows


def _lineage_parts(store: Store) -> list[Part]:
    if read_report(store, "lineage") is None:
        raise StoreError(f"{store.uri}: the run has not come to its lineage yet; curate run it on")
    return read_parts(store)
