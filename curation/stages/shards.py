"""Selected images -> WebDataset tars with their original bytes, a seekable index and a manifest.

A plan in the order of the shards is made first (`shard_plan.py`), so that each shard is written by
one worker in one pass.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation.algorithms.sampling import Ints
from curation.images.faces import HAAR, FaceBlur, FacesConfig
from curation.images.sources import read_parquet_rows
from curation.runtime.events import Events
from curation.runtime.executor import Counts, Executor, Item, Work, map_parts, require_all, timer
from curation.runtime.manifest import StageReport, begin, finish
from curation.runtime.store import (
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

READ_BYTES = 1 << 20  # of images that are read one after the other, while others are too
FACES_TABLE = "shards/faces.parquet"


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
    manifest = _manifest(cfg, shards, store)
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
        index: list[dict[str, Any]] = []
        faces: list[dict[str, int]] = []
        with self._store.publish(f"shards/{shard_name(shard)}") as scratch:
            with tarfile.open(scratch, "w", format=tarfile.GNU_FORMAT) as tar:
                for batch, found in overlapped(_batches(rows.to_pylist()), _read_samples):
                    for row, data in zip(batch, found, strict=True):
                        if blurred := self._add_sample(tar, row, data, index):
                            faces.append({"image": row["image"], "faces": blurred})
            digest = hashlib.sha256()
            with open(scratch, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            size = scratch.stat().st_size
        facts = {"images": str(len(rows)), "bytes": str(size), "sha256": digest.hexdigest()}
        # The index is last: where it is, the shard is complete.
        if self._blur is not None:
            found = pa.Table.from_pylist(faces, schema=FACES)
            write_table(self._store, _faces_path(shard), found)
        table = pa.Table.from_pylist(index, schema=SHARD_INDEX.with_metadata(facts))
        write_table(self._store, _index_path(shard), table)
        return {"images": len(rows), "bytes": size}

    def _add_sample(
        self,
        tar: tarfile.TarFile,
        row: dict[str, Any],
        data: list[bytes],
        index: list[dict[str, Any]],
    ) -> int:
        """Adds an image with its lineage and extras; returns how many of its faces were blurred."""
        key = row["id"].hex()
        image, *extras = data
        if hashlib.sha256(image).digest() != row["id"]:
            raise StoreError(
                f"{row['source']}: {row['key']} has changed since it was embedded; run again"
            )
        image, faces = self._blur.file(image) if self._blur else (image, 0)
        lineage = {name: row[name] for name in ("key", "set", "width", "height", "retrieved_by")}
        lineage |= {"id": key, "source": row["role"]}
        if faces:
            lineage["faces_blurred"] = faces
        if row["metadata"]:
            lineage["metadata"] = json.loads(row["metadata"])
        members = {row["ext"]: image}
        text = json.dumps(lineage, sort_keys=True, ensure_ascii=False)
        members["json"] = text.encode()
        for extra, content in zip(row["extras"], extras, strict=True):
            ext = extra["ext"] if extra["ext"] not in members else f"source.{extra['ext']}"
            members[ext] = content
        for ext, content in members.items():
            info = tarfile.TarInfo(f"{key}.{ext}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            offset = tar.offset - -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            digest = hashlib.sha256(content).hexdigest()
            place = {"offset": offset, "size": len(content), "sha256": digest}
            index.append({"key": key, "member": info.name, **place})
        return faces


def _batches(rows: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of a plan in groups of about READ_BYTES of images."""
    groups: list[list[dict[str, Any]]] = [[]]
    filled = 0
    for row in rows:
        if filled >= READ_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(row)
        filled += row["size"]
    return groups


def _read_samples(rows: list[dict[str, Any]]) -> list[list[bytes]]:
    return [_read_sample(row) for row in rows]


def _read_sample(row: dict[str, Any]) -> list[bytes]:
    """The image and its extras: in one read where they lie together, as in archives."""
    source, path = open_store(row["source"]), row["locator"].decode("utf-8", "surrogateescape")
    if row["offset"] < 0:
        return [source.read(path)]
    places = [(one["offset"], one["size"]) for one in (row, *row["extras"])]
    start, stop = min(at for at, _ in places), max(at + size for at, size in places)
    if stop - start > READ_BYTES + sum(size for _, size in places):
        return [source.read(path, at, size) for at, size in places]
    data = source.read(path, start, stop - start)
    return [data[at - start : at - start + size] for at, size in places]


def _manifest(cfg: ShardsConfig, shards: int, store: Store) -> dict[str, Any]:
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
    totals = {name: sum(row[name] for row in rows) for name in ("images", "bytes")}
    return {"name": cfg.name, **totals, "hash": whole, "shards": rows}
