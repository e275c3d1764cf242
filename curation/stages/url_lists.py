"""Lists of URLs -> tables of URLs in parts, so that a host's URLs all lie in one lane.

A worker that fetches has a lane to itself: the pauses and limits towards a host then hold over all
workers, without a word between them.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from curation.images.sources import readable
from curation.images.url_lists import Listed, UrlListError, read_urls
from curation.runtime.events import Events
from curation.runtime.executor import Counts, Executor, Item, Work, map_parts, require_all
from curation.runtime.manifest import fingerprint
from curation.runtime.store import Entry, Store, StoreError, compression, open_store
from curation.schema import URLS

FOLDER = "ingest/urls"
LANES = 64
ONE_LANE_BYTES = 1 << 20  # lists smaller than this together are fetched by one worker

UrlList = tuple[str, Entry]  # (root, file)


@dataclass(frozen=True)
class UrlPart:
    """A row group of a table of URLs. `digest` changes with any row of it."""

    table: str
    row_group: int
    rows: int
    lane: int
    digest: str


def read_lists(
    lists: list[UrlList], part_images: int, store: Store, executor: Executor, events: Events
) -> list[list[UrlPart]]:
    """The parts of each list. Raises StoreError for a file that is no list."""
    have = {entry.path for entry in store.list(FOLDER)}
    lanes = 1 if sum(entry.size for _, entry in lists) < ONE_LANE_BYTES else LANES
    items, tables = [], []
    for root, entry in lists:
        where = open_store(root).locate(entry.path)
        name = fingerprint(where, entry.version, part_images, lanes)[:24]
        tables.append(f"{FOLDER}/{name}.parquet")
        items.append(Item(readable(entry.path), 0, (root, entry, tables[-1])))
    worker = partial(ListWorker, store.uri, part_images, lanes)
    work = Work("ingest", items, lambda item: item.payload[2] in have, worker)
    require_all(map_parts(work, executor, events), "ingest")
    for path in have - set(tables):
        store.delete(path)
    return [_parts(store, table) for table in tables]


def _parts(store: Store, table: str) -> list[UrlPart]:
    with store.open(table) as file:
        meta = pq.ParquetFile(file).metadata
        found = json.loads(meta.metadata[b"parts"])
        rows = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
    return [
        UrlPart(table, group, rows[group], lane, digest)
        for group, (lane, digest) in enumerate(found)
    ]


class ListWorker:
    """Reads one list into a table of URLs."""

    def __init__(self, run_uri: str, part_images: int, lanes: int) -> None:
        self._store, self._part_images, self._lanes = open_store(run_uri), part_images, lanes

    def __call__(self, item: tuple[str, Entry, str]) -> Counts:
        root, entry, table = item
        source, total = open_store(root), 0
        parts: list[tuple[int, str]] = []
        with (
            self._store.publish(table) as scratch,
            pq.ParquetWriter(scratch, URLS, compression=compression(URLS)) as writer,
            source.open(entry.path) as file,
        ):
            try:
                for lane, rows in self._chunks(read_urls(file, entry.path)):
                    writer.write_table(
                        pa.Table.from_pylist(rows, schema=URLS), row_group_size=len(rows)
                    )
                    parts.append((lane, fingerprint(rows)))
                    total += len(rows)
            except UrlListError as error:
                raise StoreError(f"{source.locate(entry.path)}: {error}") from None
            if not total:
                raise StoreError(f"{source.locate(entry.path)}: a list without URLs")
            writer.add_key_value_metadata({"parts": json.dumps(parts)})
        return {"urls": total}

    def _chunks(self, listed: Iterator[Listed]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        lanes: dict[int, list[dict[str, Any]]] = {}
        for url, columns in listed:
            lane = self._lane(url)
            rows = lanes.setdefault(lane, [])
            text = json.dumps(columns, default=str, sort_keys=True, ensure_ascii=False)
            rows.append({"url": url, "columns": text})
            if len(rows) == self._part_images:
                yield lane, lanes.pop(lane)
        yield from sorted(lanes.items())

    def _lane(self, url: str) -> int:
        host = ""
        with suppress(ValueError):  # it stays in the list, to be refused by name
            host = urlsplit(url).hostname or ""
        return int.from_bytes(hashlib.sha256(host.encode()).digest()[:4], "big") % self._lanes
