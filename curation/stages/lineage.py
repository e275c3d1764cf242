"""All tables -> one row for every input image: its decision and why. Nothing is lost in silence."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from curation.runtime.events import Events
from curation.runtime.executor import Counts, Executor, Item, Work, map_parts, require_all, timer
from curation.runtime.manifest import StageReport, begin, finish
from curation.runtime.store import Store, open_store, read_table, write_table
from curation.schema import LINEAGE, lineage_path
from curation.stages.lookups import write_lookups
from curation.stages.retrieve import SAME_BYTES_TABLE, SELECTED_TABLE
from curation.stages.shard_plan import PLACEMENT_TABLE
from curation.stages.shards import FACES_TABLE
from curation.stages.tables import (
    PHASH_TABLE,
    Embedded,
    Part,
    ids_of,
    overlapped,
    read_decisions,
    read_parts,
    rows_of_part,
)

NO_NEAR_HASH = {"phash_duplicate_of": None, "phash_bits": None}
DECISIONS = ("selected", "not_retrieved", "duplicate", "near_holdout", "rejected")


@dataclass(frozen=True)
class LineageConfig:
    """Which embedding the run used."""

    embedding: str


def run(
    cfg: LineageConfig, stage_fingerprint: str, store: Store, executor: Executor, events: Events
) -> StageReport:
    """Every stage's table -> `lineage/parts/*.parquet`, a row an input image."""
    elapsed = timer()
    begin(store, "lineage", stage_fingerprint)
    parts = read_parts(store)
    have = {entry.path for entry in store.list("lineage/parts")}
    items = [Item(part.name(), part.rows, part) for part in parts]
    worker = partial(LineageWorker, cfg, store.uri)
    work = Work("lineage", items, lambda i: lineage_path(i.payload.part) in have, worker)
    result = map_parts(work, executor, events)
    require_all(result, "lineage")
    write_lookups(store, parts, executor, events)
    counts: dict[str, dict[str, int]] = {}
    for part, table in overlapped(
        parts, lambda part: read_table(store, lineage_path(part.part), ["decision"])
    ):
        column = table["decision"]
        role = counts.setdefault(part.role, dict.fromkeys(DECISIONS, 0))
        for row in column.value_counts().to_pylist():
            role[row["values"]] += row["counts"]
    found = {"decisions": counts, "computed": result.computed, "reused": result.reused}
    return finish(store, StageReport("lineage", stage_fingerprint, found, elapsed()))


class LineageWorker:
    """Joins the tables of one part."""

    def __init__(self, cfg: LineageConfig, run_uri: str) -> None:
        self._store, self._embedded = open_store(run_uri), Embedded(cfg.embedding)
        self._blurred = self._store.exists(FACES_TABLE)
        self._hashed = self._store.exists(PHASH_TABLE)
        self._parts = read_parts(self._store)

    def __call__(self, part: Part) -> Counts:
        store = self._store
        images = read_table(store, self._embedded.images_path(part)).to_pylist()
        decisions = read_decisions(store, part).to_pylist()
        selected = _by_image(rows_of_part(store, SELECTED_TABLE, part), "retrieved_by")
        shard = _by_image(rows_of_part(store, PLACEMENT_TABLE, part), "shard")
        faces = _by_image(rows_of_part(store, FACES_TABLE, part), "faces") if self._blurred else {}
        near = _near_hashes(rows_of_part(store, PHASH_TABLE, part)) if self._hashed else {}
        first = _by_image(rows_of_part(store, SAME_BYTES_TABLE, part), "first")
        firsts = ids_of(
            store, self._embedded, self._parts, np.array(list(first.values()), np.int64)
        )
        same = {n: i.tobytes().hex() for n, i in zip(first, firsts, strict=True)}
        rows = []
        for row, (image, decided) in enumerate(zip(images, decisions, strict=True)):
            number = part.base + row
            hashed = near.get(number, NO_NEAR_HASH)
            known = {**decided, **hashed}
            decision, reason = _decide(part, image, known, selected.get(number), same.get(number))
            rows.append(
                {
                    "id": image["id"].hex() if image["id"] else None,
                    "source": part.role,
                    "set": part.set or None,
                    "decision": decision,
                    "reason": reason,
                    "component": decided["component"],
                    "retrieved_by": selected.get(number, []),
                    "shard": shard.get(number),
                    "image": number,
                    "unsafe": image.get("unsafe"),
                    "faces_blurred": faces.get(number),
                    **hashed,
                    **{name: image[name] for name in ("uri", "key", "width", "height", "bytes")},
                }
            )
        write_table(store, lineage_path(part.part), pa.Table.from_pylist(rows, schema=LINEAGE))
        return {"images": len(rows)}


def _by_image(table: pa.Table, column: str) -> dict[int, Any]:
    return dict(zip(table["image"].to_pylist(), table[column].to_pylist(), strict=True))


def _near_hashes(table: pa.Table) -> dict[int, dict[str, Any]]:
    """Of images with a better one near by perceptual hash: its id, and how far it is."""
    return {
        row["image"]: {"phash_duplicate_of": row["kept_id"].hex(), "phash_bits": row["bits"]}
        for row in table.to_pylist()
    }


def _decide(
    part: Part,
    image: dict[str, Any],
    decided: dict[str, Any],
    retrieved_by: list[dict[str, Any]] | None,
    same_as: str | None,
) -> tuple[str, str]:
    """The decision, and a reason whose first word is stable."""
    other = decided["other"].hex() if decided["other"] else None
    if decided["decision"] == "rejected":
        return "rejected", image["fault"]
    if part.role == "holdout":
        return "near_holdout", "holdout_image an evaluation image itself"
    if decided["decision"] == "near_holdout":
        if other is None:
            return "near_holdout", "near_holdout by its duplicate group"
        return "near_holdout", f"near_holdout {other} cosine {decided['cosine']:.3f}"
    if decided["decision"] == "duplicate":
        if other == image["id"].hex():
            return "duplicate", f"duplicate_of {other} same bytes"
        if decided["cosine"]:
            return "duplicate", f"duplicate_of {other} cosine {decided['cosine']:.3f}"
        if other == decided["phash_duplicate_of"]:
            return "duplicate", f"duplicate_of {other} phash {decided['phash_bits']} bits"
        return "duplicate", f"duplicate_of {other} by its duplicate group"
    if same_as is not None:
        return "duplicate", f"duplicate_of {same_as} same bytes, selected from another source"
    if retrieved_by is not None:
        ways = sorted({f"{reason['set']}:{reason['how']}" for reason in retrieved_by})
        return "selected", "selected_by " + " ".join(ways)
    if part.role == "curated":
        return "not_retrieved", "query_only its set is not taken as it is"
    return "not_retrieved", "not_retrieved by any query or cluster"
