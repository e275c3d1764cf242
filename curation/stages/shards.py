"""Selected images -> WebDataset tars with their original bytes, a seekable index and a manifest.

A plan in the order of the shards is made first (`shard_plan.py`), so that each shard is written by
one worker in one pass.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from xxhash import xxh3_64_intdigest

from curation.algorithms.sampling import Ints
from curation.images.faces import HAAR, FaceBlur, FacesConfig
from curation.images.sources import read_parquet_rows
from curation.images.tar_writer import TarWriter
from curation.runtime.events import Events
from curation.runtime.executor import Counts, Executor, Item, Work, map_parts, require_all, timer
from curation.runtime.manifest import StageReport, begin, finish
from curation.runtime.store import (
    REQUESTS,
    FileStore,
    Store,
    StoreError,
    delete_all,
    open_store,
    read_table,
    read_uri,
    write_table,
)
from curation.schema import FACES, SHARD_INDEX, SHARDS_MANIFEST, SPOOL_INDEX
from curation.stages.retrieve import SELECTED_TABLE
from curation.stages.shard_plan import (
    ORDER_TABLE,
    PLACEMENT_TABLE,
    PlanConfig,
    plan,
    plan_path,
    shard_name,
    spool_path,
)
from curation.stages.tables import (
    Part,
    by_part,
    column_numpy,
    overlapped,
    read_parts,
)

BATCH_IMAGES, BATCH_BYTES = 32, 4 << 20  # read by a thread at a time
# Threads that read files. Each step of theirs asks for Python's lock, and each has memory of its
# own to touch: where every core has a worker, two take a sixth longer for large images than one.
LOCAL_READERS = 1
GAP_BYTES = 1 << 20  # that are read between an image and its extras, rather than ask twice
FACES_TABLE = "shards/faces.parquet"
_LINEAGE = json.JSONEncoder(sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True)
class ShardsConfig:
    """Images a tar, and the seed of the shuffle."""

    embedding: str
    name: str
    images_per_shard: int
    seed: int
    faces: FacesConfig | None = None


def run(
    cfg: ShardsConfig, stage_fingerprint: str, store: Store, executor: Executor, events: Events
) -> StageReport:
    """`retrieve/selected.parquet` -> `shards/*.tar`, their indexes and `shards/manifest.json`."""
    elapsed = timer()
    begin(store, "shards", stage_fingerprint)
    have = {entry.path for entry in store.list("shards")}
    spooled = _spool(store, have, executor, events)
    in_spool = frozenset(part.part for part in spooled)
    planning = PlanConfig(cfg.embedding, cfg.images_per_shard, cfg.seed, in_spool)
    if PLACEMENT_TABLE not in have:
        plan(planning, store, executor, events)
    placement = read_table(store, PLACEMENT_TABLE, ["image"])
    shards = -(-len(placement) // cfg.images_per_shard)
    items = []
    for shard in range(shards):
        size = min(cfg.images_per_shard, len(placement) - shard * cfg.images_per_shard)
        items.append(Item(shard_name(shard), size, shard))
    worker = partial(ShardWorker, store.uri, planning.shards_per_plan, cfg.faces)
    result = map_parts(
        Work("shards", items, lambda i: _index_path(i.payload) in have, worker), executor, events
    )
    require_all(result, "shards")
    blurred = {"faces_blurred": _gather_faces(shards, store)} if cfg.faces else {}
    manifest = shards_manifest(cfg.name, shards, store)
    store.write(SHARDS_MANIFEST, json.dumps(manifest, indent=1).encode())
    for folder in ("spool", "places", "plan", "faces"):
        delete_all(store, [entry.path for entry in store.list(f"shards/{folder}")])
    store.delete(ORDER_TABLE)
    counts = {name: manifest[name] for name in ("images", "bytes", "hash")}
    counts |= {**blurred, "shards": shards, "computed": result.computed, "reused": result.reused}
    return finish(store, StageReport("shards", stage_fingerprint, counts, elapsed()))


def load_faces(cfg: FacesConfig | None) -> FaceBlur | None:
    """What blurs faces, if anything does. Raises EncoderError or StoreError."""
    if cfg is None:
        return None
    return FaceBlur(cfg, None if cfg.detector == HAAR else read_uri(cfg.detector))


def _gather_faces(shards: int, store: Store) -> int:
    """Writes `shards/faces.parquet` in the order of the images; returns how many were changed."""
    if not store.exists(FACES_TABLE):
        found = [read_table(store, _faces_path(shard)) for shard in range(shards)]
        write_table(store, FACES_TABLE, pa.concat_tables(found).sort_by("image"))
    return len(read_table(store, FACES_TABLE, ["image"]))


def _faces_path(shard: int) -> str:
    return f"shards/faces/{shard:06d}.parquet"


def _index_path(shard: int) -> str:
    return f"shards/{shard:06d}.index.parquet"


def _spool(store: Store, have: set[str], executor: Executor, events: Events) -> list[Part]:
    """Copies selected rows of Parquet parts to files that can be read at random."""
    selected = column_numpy(read_table(store, SELECTED_TABLE, ["image"]), "image")
    parts = [part for part in read_parts(store) if part.kind == "parquet"]
    wanted = list(by_part(parts, selected))
    if not wanted or PLACEMENT_TABLE in have:
        return [part for part, _ in wanted]
    items = [Item(p.name(), block.stop - block.start, (p, selected[block])) for p, block in wanted]
    worker = partial(SpoolWorker, store.uri)
    result = map_parts(
        Work("shards", items, lambda i: spool_path(i.payload[0]) in have, worker), executor, events
    )
    require_all(result, "shards")
    return [part for part, _ in wanted]


class SpoolWorker:
    """Copies the selected rows of one Parquet part, with the row's other columns as JSON."""

    def __init__(self, run_uri: str) -> None:
        self._store = open_store(run_uri)

    def __call__(self, item: tuple[Part, Ints]) -> Counts:
        part, numbers = item
        member = read_table(self._store, part.table, row_group=part.row_group).slice(0, 1)
        first = member.to_pylist()[0]
        path = first["locator"].decode("utf-8", "surrogateescape")
        rows: list[dict[str, Any]] = []
        offset = 0
        wanted = set((numbers - part.base).tolist())
        with (
            part.open_source(self._store).open(path) as file,
            self._store.publish(spool_path(part).replace(".parquet", ".bin")) as scratch,
            open(scratch, "wb") as out,
        ):
            stream = read_parquet_rows(file, first["offset"], part.rows)
            for row, (data, columns) in enumerate(stream):
                if len(rows) == len(wanted):
                    break  # a damaged file can't be read to its end
                if row in wanted and data is not None:
                    out.write(data)
                    text = json.dumps(columns, default=str, sort_keys=True, ensure_ascii=False)
                    place = {"image": part.base + row, "offset": offset, "size": len(data)}
                    rows.append({**place, "metadata": text})
                    offset += len(data)
        write_table(self._store, spool_path(part), pa.Table.from_pylist(rows, schema=SPOOL_INDEX))
        return {"images": len(rows)}


class ShardWorker:
    """Writes one shard a call: for each image its bytes, one JSON of lineage, and its extras."""

    def __init__(self, run_uri: str, shards_per_plan: int, faces: FacesConfig | None) -> None:
        self._store, self._shards_per_plan = open_store(run_uri), shards_per_plan
        self._blur = load_faces(faces)

    def __call__(self, shard: int) -> Counts:
        number, group = divmod(shard, self._shards_per_plan)
        rows = read_table(self._store, plan_path(number), row_group=group)
        index: list[tuple[str, str, int, int, str]] = []
        faces: list[dict[str, int]] = []
        with (
            self._store.publish(f"shards/{shard_name(shard)}") as scratch,
            TarWriter(scratch) as tar,
        ):
            for row, files in _originals(rows):
                if blurred := self._add_sample(tar, row, files, index):
                    faces.append({"image": row["image"], "faces": blurred})
        facts = {"images": str(len(rows)), "bytes": str(tar.size), "sha256": tar.sha256}
        # The index is last: where it is, the shard is complete.
        if self._blur is not None:
            found = pa.Table.from_pylist(faces, schema=FACES)
            write_table(self._store, _faces_path(shard), found)
        columns = [list(column) for column in zip(*index, strict=True)]
        table = pa.table(columns, schema=SHARD_INDEX.with_metadata(facts))
        write_table(self._store, _index_path(shard), table)
        return {"images": len(rows), "bytes": tar.size}

    def _add_sample(
        self,
        tar: TarWriter,
        row: dict[str, Any],
        files: list[bytes],
        index: list[tuple[str, str, int, int, str]],
    ) -> int:
        """Adds an image with its lineage and extras; returns how many of its faces were blurred."""
        key, (original, *extras) = row["id"].hex(), files
        image, faces = self._blur.file(original) if self._blur else (original, 0)
        lineage = {name: row[name] for name in ("key", "set", "width", "height", "retrieved_by")}
        lineage |= {"id": key, "source": row["role"]}
        if faces:
            lineage["faces_blurred"] = faces
        if row["metadata"]:
            lineage["metadata"] = json.loads(row["metadata"])
        members = {row["ext"]: image, "json": _LINEAGE.encode(lineage).encode()}
        for extra, data in zip(row["extras"], extras, strict=True):
            ext = extra["ext"] if extra["ext"] not in members else f"source.{extra['ext']}"
            members[ext] = data
        for ext, data in members.items():
            member = f"{key}.{ext}"
            digest = key if data is original else hashlib.sha256(data).hexdigest()
            index.append((key, member, tar.add(member, data), len(data), digest))
        return faces


def _originals(rows: pa.Table) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    """Each row with the bytes of its image and extras; the next ones are being read meanwhile."""
    batches: list[list[dict[str, Any]]] = []
    filled = BATCH_BYTES
    for row in rows.to_pylist():
        size = row["size"] + sum(extra["size"] for extra in row["extras"])
        if filled + size > BATCH_BYTES or len(batches[-1]) == BATCH_IMAGES:
            batches.append([])
            filled = 0
        batches[-1].append(row)
        filled += size
    sources = {uri: open_store(uri) for uri in pc.unique(rows["source"]).to_pylist()}
    local = all(isinstance(source, FileStore) for source in sources.values())
    ahead = LOCAL_READERS if local else REQUESTS
    for batch, files in overlapped(batches, partial(_read_batch, sources), ahead):
        yield from zip(batch, files, strict=True)


def _read_batch(sources: dict[str, Store], rows: list[dict[str, Any]]) -> list[list[bytes]]:
    """The bytes of each row's image, checked, and of its extras. Errors: StoreError."""
    found = []
    for row in rows:
        image, *extras = _read_sample(sources[row["source"]], row)
        if not _is_same(image, row):
            raise StoreError(
                f"{row['source']}: {row['key']} has changed since it was embedded; run again"
            )
        found.append([image, *extras])
    return found


def _is_same(image: bytes, row: dict[str, Any]) -> bool:
    """Whether an image has the bytes that were embedded."""
    checksum: int | None = row["checksum"]
    if checksum is None:  # of a run that was embedded before there were any
        return hashlib.sha256(image).digest() == bytes(row["id"])
    return xxh3_64_intdigest(image) == checksum


def _read_sample(source: Store, row: dict[str, Any]) -> list[bytes]:
    """The image and its extras: in one read where they lie together, as in archives."""
    path = row["locator"].decode("utf-8", "surrogateescape")
    if row["offset"] < 0:
        return [source.read(path)]
    places = [(one["offset"], one["size"]) for one in (row, *row["extras"])]
    start, stop = min(at for at, _ in places), max(at + size for at, size in places)
    if stop - start > GAP_BYTES + sum(size for _, size in places):
        return [source.read(path, at, size) for at, size in places]
    data = source.read(path, start, stop - start)
    return [data[at - start : at - start + size] for at, size in places]


def shards_manifest(name: str, shards: int, store: Store) -> dict[str, Any]:
    """Counts and checksums of all shards; `hash` changes with any byte of any of them."""

    def facts(shard: int) -> dict[str, Any]:
        with store.open(_index_path(shard)) as file:
            found = pq.read_schema(file).metadata
        return {
            "name": shard_name(shard),
            "images": int(found[b"images"]),
            "bytes": int(found[b"bytes"]),
            "sha256": found[b"sha256"].decode(),
        }

    rows = [row for _, row in overlapped(range(shards), facts)]
    whole = hashlib.sha256("\n".join(row["sha256"] for row in rows).encode()).hexdigest()
    totals = {total: sum(row[total] for row in rows) for total in ("images", "bytes")}
    return {"name": name, **totals, "hash": whole, "shards": rows}
