"""One image among hundreds of millions: its row by id, its duplicates, and what a query brought.

The run's lookup tables are sorted. Which rows a row group spans is read once a run from the
footers; a question then reads the few row groups that may hold the key.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.runtime.store import Store, read_table
from curation.schema import PARTS_TABLE, id_prefix, lineage_path, lookup_folder
from curation.service import models
from curation.service.cache import Cache
from curation.service.intact import intact
from curation.service.runs import NotThere, Run

ID_DIGITS = 8  # at least
MAX_SAME = 20  # images of one id, or of ids that begin alike
MAX_SHOWN = 60  # duplicates, or images that a query brought
SCAN_S = 2.0
RUNS = 8
PART_BYTES = 64 << 20
READERS = ThreadPoolExecutor(16, "look-up")

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Spans:
    """The row groups of one lookup: their files, and their first and last keys (n,)."""

    files: tuple[tuple[str, pq.FileMetaData], ...]
    file: npt.NDArray[np.int32]
    group: npt.NDArray[np.int32]
    first: npt.NDArray[np.uint64]
    last: npt.NDArray[np.uint64]


class LineageReader:
    """Answers for all runs; keeps the spans of some and the parts that were read last."""

    def __init__(self) -> None:
        self._spans: Cache[Spans] = Cache(3 * RUNS, lambda _: 1)
        self._bases: Cache[Numbers] = Cache(RUNS, lambda _: 1)
        self._parts: Cache[pa.Table] = Cache(PART_BYTES, lambda table: int(table.nbytes))

    def story(self, run: Run, wanted: str) -> models.Story:
        """The images whose id begins with `wanted` and what is near them. Raises NotThere."""
        rows = self._of_id(run, wanted)
        return models.Story(
            images=rows,
            duplicates=self._duplicates(run, rows[0]),
            brought=self._brought(run, rows[0]),
        )

    def first(self, run: Run, wanted: str) -> models.Image:
        """The first image whose id begins with `wanted`. Raises NotThere."""
        return self._of_id(run, wanted)[0]

    def _of_id(self, run: Run, wanted: str) -> list[models.Image]:
        wanted = wanted.lower()
        if len(wanted) < ID_DIGITS or not set(wanted) <= set("0123456789abcdef"):
            raise NotThere(f"an id is {ID_DIGITS} to 64 hexadecimal digits")
        low, high = (id_prefix(wanted.ljust(16, fill)) for fill in "0f")
        rows = self.rows(run, self._numbers(run, "id", low, high, MAX_SAME))
        rows = [row for row in rows if row.id is not None and row.id.startswith(wanted)]
        if not rows:
            raise NotThere(f"run '{run.name}' has no image with the id '{wanted[:64]}'")
        return rows

    def _duplicates(self, run: Run, row: models.Image) -> list[models.Image]:
        if row.component is None:
            return []
        numbers = self._numbers(run, "component", row.component, row.component, MAX_SHOWN)
        rows = self.rows(run, numbers)
        gone = ("duplicate", "near_holdout")
        return sorted(rows, key=lambda one: (one.decision in gone, one.image))

    def _brought(self, run: Run, row: models.Image) -> list[models.Image]:
        """Nearest first; where a query has no cosine (clusters) in the order of the run."""
        if row.id is None or row.source != "curated":
            return []
        key = id_prefix(row.id)
        rows = self.rows(run, self._numbers(run, "query", key, key, MAX_SHOWN))

        def cosine(one: models.Image) -> float:
            mine = [by.cosine for by in one.retrieved_by if by.query_id == row.id]
            return max((value for value in mine if value is not None), default=-1.0)

        return sorted(rows, key=lambda one: -cosine(one))

    def _numbers(self, run: Run, lookup: str, low: int, high: int, limit: int) -> list[int]:
        """Up to `limit` image numbers whose key lies between `low` and `high`, in order."""
        fingerprint = run.report("lineage").fingerprint
        store = run.store
        spans = self._spans.get((run.path, lookup, fingerprint), lambda: _spans(store, lookup))
        chosen = np.flatnonzero((spans.first <= np.uint64(high)) & (spans.last >= np.uint64(low)))

        def read(at: int) -> Numbers:
            path, footer = spans.files[spans.file[at]]
            with intact(store, path), store.open(path) as file:
                table = pq.ParquetFile(file, metadata=footer).read_row_group(
                    int(spans.group[at]), use_threads=False
                )
            keys = table["key"].to_numpy()
            start = int(np.searchsorted(keys, np.uint64(low), "left"))
            stop = int(np.searchsorted(keys, np.uint64(high), "right"))
            numbers: Numbers = table["image"].to_numpy()[start:stop]
            return numbers[:limit]

        found = np.concatenate([np.zeros(0, np.int64), *READERS.map(read, chosen[:1024])])
        return [int(number) for number in np.sort(found)[:limit]]

    def rows(self, run: Run, numbers: Sequence[int]) -> list[models.Image]:
        """The lineage of images by number, in the order given."""
        fingerprint = run.report("lineage").fingerprint
        bases = self._bases.get((run.path, fingerprint), lambda: _bases(run.store))
        parts = (np.searchsorted(bases, numbers, "right") - 1).tolist()
        wanted = dict.fromkeys(parts)
        tables = dict(
            zip(
                wanted,
                READERS.map(lambda at: self._part(run, fingerprint, at), wanted),
                strict=True,
            )
        )
        found = []
        for number, part in zip(numbers, parts, strict=True):
            with intact(run.store, lineage_path(part)):
                row = tables[part].slice(number - int(bases[part]), 1).to_pylist()[0]
                found.append(models.Image(**row))
        return found

    def _part(self, run: Run, fingerprint: str, part: int) -> pa.Table:
        def read() -> pa.Table:
            with intact(run.store, lineage_path(part)):
                return read_table(run.store, lineage_path(part))

        return self._parts.get((run.path, fingerprint, part), read)

    def by_key(self, run: Run, key: str, start: int) -> models.Found:
        """Images whose key is `key` or ends with `/key`: reads parts from `start` on for a while.

        Keys are in no order that a search could use.
        """
        fingerprint = run.report("lineage").fingerprint
        bases = self._bases.get((run.path, fingerprint), lambda: _bases(run.store))
        until = time.monotonic() + SCAN_S
        numbers: list[int] = []
        part = min(start, len(bases))
        while part < len(bases) and time.monotonic() < until and len(numbers) < MAX_SAME:
            with intact(run.store, lineage_path(part)):
                keys = read_table(run.store, lineage_path(part), ["key"])["key"]
            match = pc.or_(pc.equal(keys, key), pc.ends_with(keys, "/" + key))
            rows = np.flatnonzero(match.to_numpy())
            numbers += (rows + int(bases[part])).tolist()
            part += 1
        return models.Found(
            images=self.rows(run, numbers[:MAX_SHOWN]),
            parts=len(bases),
            searched=part,
            next=part if part < len(bases) else None,
        )


def _bases(store: Store) -> Numbers:
    """The number of each part's first image (parts,)."""
    with intact(store, PARTS_TABLE):
        numbers: Numbers = read_table(store, PARTS_TABLE, ["base"])["base"].to_numpy()
        return numbers


def _spans(store: Store, lookup: str) -> Spans:
    """Reads all footers of one lookup: a file for some millions of images."""
    paths = [entry.path for entry in store.list(lookup_folder(lookup))]
    if not paths:
        raise NotThere("this run was made by an older LVD: `curate run` adds its lookup tables")

    def footer(path: str) -> pq.FileMetaData:
        with intact(store, path), store.open(path) as file:
            return pq.read_metadata(file)

    files = tuple(zip(paths, READERS.map(footer, paths), strict=True))
    rows: list[tuple[int, int, Any, Any]] = []
    for number, (_, metadata) in enumerate(files):
        for group in range(metadata.num_row_groups):
            if metadata.row_group(group).num_rows:
                told = metadata.row_group(group).column(0).statistics
                rows.append((number, group, told.min, told.max))
    columns = zip(*rows, strict=True) if rows else ((), (), (), ())
    kinds = (np.int32, np.int32, np.uint64, np.uint64)
    return Spans(files, *(np.array(c, kind) for c, kind in zip(columns, kinds, strict=True)))
