"""Sources -> members tables and the list of parts: finds every image, reads none.

Folders are listed here; tars and Parquet files are scanned by workers, one table an archive; lists
of URLs are fetched first. The tables are content-addressed, so that a new source or a changed
archive costs only itself.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation.images.sources import (
    Member,
    expand_braces,
    kind_of,
    readable,
    scan_parquet,
    scan_tar,
)
from curation.images.url_lists import LIST_EXTENSIONS, is_url_list
from curation.runtime.events import Events
from curation.runtime.executor import Counts, Executor, Item, Work, map_parts, require_all, timer
from curation.runtime.manifest import StageReport, begin, fingerprint, finish
from curation.runtime.store import Entry, Store, StoreError, open_store, split_uri
from curation.schema import PARTS, PARTS_TABLE
from curation.stages import fetch
from curation.stages.members import Row, merge, write_groups, write_members

FOOTER_READERS = 16
TYPICAL_BYTES = 50_000  # of one image in an archive
URL_BYTES = 100  # of one URL in a list
NOTHING = {
    None: "no images, tars or Parquet files",
    "urls": f"no lists of URLs ({', '.join(LIST_EXTENSIONS)})",
}


@dataclass(frozen=True)
class SourceSpec:
    """One source of the recipe. `field` is its place there, for errors."""

    field: str
    role: str
    set: str
    uri: str
    format: str | None


@dataclass(frozen=True)
class IngestConfig:
    """All sources in order (curated, holdout, pool), the images a part may hold, and for lists of
    URLs how they are fetched."""

    sources: tuple[SourceSpec, ...]
    part_images: int
    fetching: fetch.Fetching


@dataclass(frozen=True)
class Survey:
    """What a listing of one source found. `digest` changes with any file of it."""

    spec: SourceSpec
    digest: str
    images: tuple[str, ...]  # roots that hold image files
    image_files: int
    archives: tuple[tuple[str, Entry, str], ...]  # (root, file, kind)
    ignored: int

    def estimate(self) -> int:
        """About how many images this is, before any archive is opened."""
        typical = URL_BYTES if self.spec.format == "urls" else TYPICAL_BYTES
        return self.image_files + sum(entry.size for _, entry, _ in self.archives) // typical


def survey(cfg: IngestConfig) -> list[Survey]:
    """Lists every source. Raises StoreError naming the recipe fields of all that can't be used."""
    surveys, faults = [], []
    for spec in cfg.sources:
        try:
            surveys.append(_survey(spec))
        except StoreError as error:
            faults.append(str(error))
    if faults:
        raise StoreError("\n  ".join(faults))
    return surveys


def run(
    cfg: IngestConfig,
    surveys: list[Survey],
    stage_fingerprint: str,
    store: Store,
    executor: Executor,
    events: Events,
) -> StageReport:
    """Sources -> `ingest/members/*.parquet` and `ingest/parts.parquet`."""
    elapsed = timer()
    begin(store, "ingest", stage_fingerprint, keep=("members", "urls", "fetched"))
    have = {entry.path for entry in store.list("ingest/members")}
    lists = [(root, e) for s in surveys for root, e, kind in s.archives if kind == "urls"]
    fetched = iter(fetch.run(cfg.fetching, lists, cfg.part_images, store, executor, events))
    tables: list[tuple[SourceSpec, str, str, str]] = []  # (spec, root, kind, table)
    scans = []
    for found in surveys:
        for root in found.images:
            table = _table_name("files", root, found.digest, cfg.part_images)
            if table not in have:
                write_members(store, table, _listed_files(found.spec, root), cfg.part_images)
            tables.append((found.spec, root, "folder", table))
        for root, entry, kind in found.archives:
            if kind == "urls":
                tables += [(found.spec, "", "webdataset", table) for table in next(fetched)]
                continue
            where = open_store(root).locate(entry.path)
            table = _table_name(where, entry.version + entry.fault, cfg.part_images)
            tables.append((found.spec, root, kind, table))
            name = f"{found.spec.set or found.spec.role}/{readable(entry.path)}"
            scans.append(Item(name, 1, (root, entry, kind, table)))
    result = map_parts(
        Work(
            "ingest",
            scans,
            lambda item: item.payload[3] in have,
            partial(ScanWorker, store.uri, cfg.part_images),
        ),
        executor,
        events,
    )
    require_all(result, "ingest")
    counts = _write_parts(store, tables)
    keep = {table for *_, table in tables}
    for path in have - keep:
        store.delete(path)
    counts["ignored_files"] = sum(found.ignored for found in surveys)
    counts |= {"computed": result.computed, "reused": result.reused}
    return finish(store, StageReport("ingest", stage_fingerprint, counts, elapsed()))


def identity(cfg: IngestConfig, surveys: list[Survey]) -> str:
    """Changes with the sources' places in the recipe and with their files."""
    places = [(s.spec.role, s.spec.set, s.digest) for s in surveys]
    fetched = any(s.spec.format == "urls" for s in surveys)
    return fingerprint(cfg.part_images, places, *(cfg.fetching.rules if fetched else ()))


def _survey(spec: SourceSpec) -> Survey:
    images: dict[str, None] = {}
    archives, folders, files, ignored = [], set(), 0, 0
    digest = hashlib.sha256(json.dumps([spec.uri, spec.format]).encode())
    for root, entry in _files(spec):
        kind = _kind(spec, entry)
        if kind is None:
            ignored += 1
            continue
        line = f"{root}\0{entry.path}\0{entry.size}\0{entry.version}\0{entry.fault}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
        if kind == "folder":
            images[root] = None
            folders.add((root, entry.path.rpartition("/")[0]))
            files += 1
        else:
            archives.append((root, entry, kind))
    archives, sidecars = _without_sidecars(archives, folders)
    if not images and not archives:
        what = NOTHING.get(spec.format, f"no {spec.format} files")
        raise StoreError(
            f"{spec.field}.uri: {spec.uri}: {what}"
            + (f" ({ignored} other files)" if ignored else "")
        )
    ignored += sidecars
    return Survey(spec, digest.hexdigest(), tuple(images), files, tuple(archives), ignored)


def _without_sidecars(
    archives: list[tuple[str, Entry, str]], folders: set[tuple[str, str]]
) -> tuple[list[tuple[str, Entry, str]], int]:
    """Drops img2dataset's metadata: a Parquet file beside a tar or image folder of its name."""
    tars = {(root, e.path.rpartition(".")[0]) for root, e, kind in archives if kind == "webdataset"}
    beside = tars | folders
    kept = [
        (root, entry, kind)
        for root, entry, kind in archives
        if kind != "parquet" or (root, entry.path.rpartition(".")[0]) not in beside
    ]
    return kept, len(archives) - len(kept)


def _files(spec: SourceSpec, only: str = "") -> Iterator[tuple[str, Entry]]:
    """(root, file) of everything a source names: a file, a folder, or many by braces.

    `only` limits this to one of the roots.
    """
    try:
        uris = expand_braces(spec.uri)
    except ValueError as error:
        raise StoreError(f"{spec.field}.uri: {error}") from None
    for uri in uris:
        try:
            root, name = split_uri(uri)
            if only not in ("", root, uri):
                continue
            is_listed = spec.format == "urls" and is_url_list(name)
            if (is_listed or kind_of(name)) and not uri.endswith("/") and _is_file(root, name):
                yield root, _opened(root, open_store(root).stat(name))
                continue
            store, found = open_store(uri), False
            if not uri.startswith("s3://") and not os.path.isdir(store.uri):
                advice = "; for a list of URLs say format: urls" if is_url_list(name) else ""
                raise StoreError(f"{uri}: no such file or folder of images{advice}")
            for entry in store.list():
                found = True
                if not entry.path:
                    raise StoreError(f"{uri}: {entry.fault}")
                yield uri, _opened(uri, entry)
            if not found:
                raise StoreError(f"{uri}: nothing there")
        except StoreError as error:
            raise StoreError(f"{spec.field}.uri: {error}") from None


def _is_file(root: str, name: str) -> bool:
    if root.startswith("s3://"):
        return open_store(root).exists(name)
    return os.path.isfile(os.path.join(os.path.expanduser(root), name))


def _opened(root: str, entry: Entry) -> Entry:
    """The entry; a local archive that can't be opened gets that as its fault."""
    if root.startswith("s3://") or entry.fault or kind_of(entry.path) in (None, "folder"):
        return entry
    try:
        open_store(root).open(entry.path).close()
    except StoreError as error:
        return replace(entry, fault=f"unreadable {str(error).rpartition(': ')[2]}")
    return entry


def _kind(spec: SourceSpec, entry: Entry) -> str | None:
    if spec.format == "urls":
        return "urls" if is_url_list(entry.path) else None
    kind = kind_of(entry.path)
    if kind is None and entry.fault.startswith("unreadable"):
        return "folder"  # a folder or link that can't be read is recorded, not passed over
    return kind if spec.format in (None, kind) else None


def _listed_files(spec: SourceSpec, wanted: str) -> Iterator[Row]:
    store = open_store(wanted)
    for root, entry in _files(spec, only=wanted):
        if root == wanted and _kind(spec, entry) == "folder":
            where = readable(store.locate(entry.path))
            member = Member(entry.path, -1, entry.size, fault=entry.fault or None)
            yield where, entry.path, member, entry.version


def _table_name(*identity: Any) -> str:
    return f"ingest/members/{fingerprint(*identity)[:24]}.parquet"


class ScanWorker:
    """Scans one archive into its members table."""

    def __init__(self, run_uri: str, part_images: int) -> None:
        self._store = open_store(run_uri)
        self._part_images = part_images

    def __call__(self, item: tuple[str, Entry, str, str]) -> Counts:
        root, entry, kind, table = item
        source = open_store(root)
        where = readable(source.locate(entry.path))

        def rows(members: Iterable[Member]) -> Iterator[Row]:
            for member in members:
                name = member.name or entry.path  # the archive itself has no member name
                named = Member(name, member.offset, member.size, member.extras, member.fault)
                yield where, entry.path, named, entry.version

        if entry.fault:
            faulty = [Member("", 0, 0, fault=entry.fault)]
            return {"members": write_members(self._store, table, rows(faulty), self._part_images)}
        with source.open(entry.path) as file:
            if kind == "webdataset":
                found = rows(scan_tar(file, entry.size))
                count = write_members(self._store, table, found, self._part_images)
            else:
                groups = (list(rows(group)) for group in scan_parquet(file))
                count = write_groups(self._store, table, merge(groups, self._part_images))
        return {"members": count}


def _write_parts(store: Store, tables: list[tuple[SourceSpec, str, str, str]]) -> dict[str, Any]:
    """The list of parts from the footers of all tables, with every image's number settled."""

    def footer(table: str) -> tuple[list[int], list[str]]:
        with store.open(table) as file:
            meta = pq.ParquetFile(file).metadata
            rows = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
            return rows, json.loads(meta.metadata[b"digests"])

    parts: list[dict[str, Any]] = []
    base = 0
    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        footers = pool.map(footer, [table for *_, table in tables])
        for (spec, root, kind, table), (rows, digests) in zip(tables, footers, strict=True):
            for group, (count, digest) in enumerate(zip(rows, digests, strict=True)):
                identity = fingerprint(root, kind, digest)
                place = dict(role=spec.role, set=spec.set, source=root, kind=kind, table=table)
                numbers = dict(part=len(parts), row_group=group, rows=count, base=base)
                parts.append({**place, **numbers, "fingerprint": identity})
                base += count
    with store.publish(PARTS_TABLE) as scratch:
        pq.write_table(pa.Table.from_pylist(parts, schema=PARTS), scratch)
    return {"images": base, "parts": len(parts)}
