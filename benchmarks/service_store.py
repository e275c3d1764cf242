"""A finished run of LVD-142M's size, of which only what a reader opens is on the disk.

Every table that the service lists or searches whole has its full size: the list of parts, the
manifest of 120,000 shards, and the lookup tables of 142 million images (5 GB). Of the files that
are opened one by one (lineage parts, shards) some are there; questions are asked about those.
"""

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from curation.runtime.manifest import StageReport, finish
from curation.runtime.store import FileStore, write_table
from curation.schema import (
    LINEAGE,
    LOOKUP,
    PARTS,
    PARTS_TABLE,
    RECIPE_FILE,
    REPORT_JSON,
    SHARD_INDEX,
    SHARDS_MANIFEST,
    lineage_path,
    lookup_folder,
)
from curation.stages.lookups import GROUP_IMAGES, ROW_GROUP

PART_IMAGES = 10_000
REAL_PARTS = 40
REAL_SHARDS = 12
QUERIES = 2_000  # of the real parts' images
GROUPED = 0.3  # share of images in duplicate groups

Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Size:
    """Of the whole run."""

    images: int
    shards: int

    @property
    def parts(self) -> int:
        return -(-self.images // PART_IMAGES)

    @property
    def shard_images(self) -> int:
        return -(-self.images // self.shards)


def build(folder: Path, size: Size) -> list[str]:
    """Writes the run; returns the ids of the images of its real parts, those in shards first."""
    rng = np.random.default_rng(0)
    store = FileStore(str(folder))
    ids = _write_shards(store, size, rng)
    rest = REAL_PARTS * PART_IMAGES - len(ids)
    ids += [row.tobytes().hex() for row in rng.integers(0, 256, (rest, 32), np.uint8)]
    rows = _lineage_rows(ids, size, rng)
    for part in range(REAL_PARTS):
        table = rows.slice(part * PART_IMAGES, PART_IMAGES)
        write_table(store, lineage_path(part), table)
    _write_lookups(store, size, rows, rng)
    _write_parts(store, size)
    _write_markers(store, size)
    return ids


def _write_shards(store: FileStore, size: Size, rng: np.random.Generator) -> list[str]:
    """Some shards as they are, and the manifest of all."""
    ids: list[str] = []
    listed = [
        _shard_row(n, size, hashlib.sha256(b"%d" % n).hexdigest()) for n in range(size.shards)
    ]
    for number in range(REAL_SHARDS):
        index = []
        with store.publish(f"shards/{number:06d}.tar") as scratch:
            with tarfile.open(scratch, "w", format=tarfile.GNU_FORMAT) as tar:
                for _ in range(size.shard_images):
                    index.append(_add_image(tar, rng))
            data = scratch.read_bytes()
        listed[number] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        table = pa.Table.from_pylist(index, schema=SHARD_INDEX)
        write_table(store, f"shards/{number:06d}.index.parquet", table)
        ids += [row["key"] for row in index]
    manifest = {"name": "large", "images": size.images, "bytes": 0, "hash": "", "shards": listed}
    store.write(SHARDS_MANIFEST, json.dumps(manifest, indent=1).encode())
    return ids


def _shard_row(number: int, size: Size, digest: str) -> dict[str, Any]:
    images = size.shard_images
    return {"name": f"{number:06d}.tar", "images": images, "bytes": 10**8, "sha256": digest}


def _add_image(tar: tarfile.TarFile, rng: np.random.Generator) -> dict[str, Any]:
    """A photograph-like JPEG of 256 pixels a side under its sha256; its row in the index."""
    coarse = rng.integers(0, 256, (6, 6, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    data = buffer.getvalue()
    key = hashlib.sha256(data).hexdigest()
    info = tarfile.TarInfo(f"{key}.jpg")
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    offset = tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return {"key": key, "member": info.name, "offset": offset, "size": len(data), "sha256": key}


def _lineage_rows(ids: list[str], size: Size, rng: np.random.Generator) -> pa.Table:
    """The real parts: the first QUERIES images are curated and brought the others."""
    rows = []
    grouped = rng.random(len(ids)) < GROUPED
    for number, id in enumerate(ids):
        curated = number < QUERIES
        by = {"set": "a", "query_id": ids[number % QUERIES], "how": "sample", "cosine": 0.5}
        rows.append(
            {
                "id": id,
                "source": "curated" if curated else "pool",
                "set": "a" if curated else None,
                "uri": f"s3://crawl/{number // PART_IMAGES:05d}.tar",
                "key": f"{number:09d}.jpg",
                "decision": "selected",
                "reason": "selected_by a:sample",
                "component": number // 4 * 4 if grouped[number] else None,
                "retrieved_by": [] if curated else [by],
                "shard": f"{number // size.shard_images:06d}.tar",
                "width": 256,
                "height": 256,
                "bytes": 5000,
                "image": number,
            }
        )
    return pa.Table.from_pylist(rows, schema=LINEAGE)


def _write_lookups(store: FileStore, size: Size, real: pa.Table, rng: np.random.Generator) -> None:
    """Keys of all images: those of the real parts, and random ones for the others."""
    for group, start in enumerate(range(0, size.images, GROUP_IMAGES)):
        images = np.arange(start, min(start + GROUP_IMAGES, size.images))
        by_id = rng.integers(0, 1 << 64, len(images), np.uint64, endpoint=False)
        by_query = rng.integers(0, 1 << 64, len(images), np.uint64, endpoint=False)
        grouped = np.flatnonzero(rng.random(len(images)) < GROUPED)
        components = (images[grouped] // 3 * 3).astype(np.uint64)
        if group == 0:
            count = len(real)
            by_id[:count] = _prefixes(real["id"].to_pylist())
            asked = [
                by[0]["query_id"] if by else "f" * 64 for by in real["retrieved_by"].to_pylist()
            ]
            by_query[:count] = _prefixes(asked)
            mine = [-1 if one is None else one for one in real["component"].to_pylist()]
            members = np.flatnonzero(np.array(mine) >= 0)
            others = grouped >= count
            grouped = np.r_[members, grouped[others]]
            components = np.r_[
                np.array(mine, np.int64)[members].astype(np.uint64), components[others]
            ]
        _write_lookup(store, "id", group, by_id, images)
        _write_lookup(store, "component", group, components, images[grouped])
        _write_lookup(store, "query", group, by_query, images)


def _prefixes(ids: list[str]) -> Keys:
    return np.array([int(id[:16], 16) for id in ids], np.uint64)


def _write_lookup(
    store: FileStore, lookup: str, group: int, keys: Keys, images: npt.NDArray[np.int64]
) -> None:
    order = np.argsort(keys, kind="stable")
    table = pa.Table.from_arrays([pa.array(keys[order]), pa.array(images[order])], schema=LOOKUP)
    path = f"{lookup_folder(lookup)}/{group:06d}.parquet"
    write_table(store, path, table, row_group_size=ROW_GROUP)


def _write_parts(store: FileStore, size: Size) -> None:
    part = np.arange(size.parts)
    base = part * PART_IMAGES
    columns = {
        "part": part.astype(np.int32),
        "role": np.where(base < QUERIES, "curated", "pool"),
        "set": np.where(base < QUERIES, "a", ""),
        "source": np.full(size.parts, "s3://crawl"),
        "kind": np.full(size.parts, "webdataset"),
        "table": np.char.add("ingest/members/", part.astype(str)),
        "row_group": np.zeros(size.parts, np.int32),
        "rows": np.minimum(PART_IMAGES, size.images - base),
        "base": base,
        "fingerprint": np.array([hashlib.sha256(b"%d" % n).hexdigest() for n in part]),
    }
    arrays = [pa.array(columns[name]).cast(PARTS.field(name).type) for name in PARTS.names]
    write_table(store, PARTS_TABLE, pa.Table.from_arrays(arrays, schema=PARTS))


def _write_markers(store: FileStore, size: Size) -> None:
    counts: dict[str, Any] = {name: {} for name in ("cluster", "report")}
    counts["ingest"] = {"images": size.images, "parts": size.parts}
    counts["embed"] = {"images": size.images, "rejected": 0, "faults": {}, "embedding": "e"}
    counts["dedup"] = {"kept": size.images, "duplicate": 0, "near_holdout": 0}
    counts["cluster"] = {"images": size.images}
    counts["retrieve"] = {"selected": size.images}
    shards = {"images": size.images, "shards": size.shards, "bytes": 10**8 * size.shards}
    counts["shards"] = {**shards, "hash": "0" * 64}
    by_role = {"pool": {"selected": size.images - QUERIES}, "curated": {"selected": QUERIES}}
    counts["lineage"] = {"decisions": by_role}
    for stage, found in counts.items():
        finish(store, StageReport(stage, f"{stage}-1", found, 3600.0))
        status = {"stage": stage, "state": "done", "message": "", "heartbeat": 1.0}
        store.write(f"status/{stage}.json", json.dumps(status).encode())
    store.write(REPORT_JSON, json.dumps({"composition": {"rows": []}, "notices": []}).encode())
    store.write(RECIPE_FILE, b"name: large\n")
