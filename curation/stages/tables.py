"""Reading the tables of earlier stages: the list of parts, their images, vectors and decisions."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.runtime.manifest import embedded_name
from curation.runtime.store import REQUESTS, Store, open_store, read_table
from curation.schema import PARTS_TABLE

EXACT_TABLE = "embed/exact.parquet"
PHASH_TABLE = "embed/phash.parquet"


@dataclass(frozen=True)
class Part:
    """A bounded slice of one source. `base` is the number of its first image."""

    part: int
    role: str
    set: str
    source: str
    kind: str
    table: str
    row_group: int
    rows: int
    base: int
    fingerprint: str

    def name(self) -> str:
        return f"{self.role}/{self.set or 'pool'}/{self.part:06d}"

    def open_source(self, run: Store) -> Store:
        """Where the part's images lie; what was fetched lies in the run itself."""
        return open_store(self.source) if self.source else run


def read_parts(store: Store, *roles: str) -> list[Part]:
    """The parts of some roles (all when none is named), in order."""
    rows = read_table(store, PARTS_TABLE).to_pylist()
    return [Part(**row) for row in rows if not roles or row["role"] in roles]


What = TypeVar("What")
Found = TypeVar("Found")


def overlapped(
    items: Sequence[What], do: Callable[[What], Found], ahead: int = REQUESTS
) -> Iterator[tuple[What, Found]]:
    """Each item with what `do` gives for it, in order; the next ones are being done meanwhile.

    For loops over very many tables, which on S3 would wait for one request at a time.
    """
    with ThreadPoolExecutor(ahead) as pool:
        coming: deque[Future[Found]] = deque()
        for number, item in enumerate(items):
            while len(coming) < ahead and number + len(coming) < len(items):
                coming.append(pool.submit(do, items[number + len(coming)]))
            yield item, coming.popleft().result()


@dataclass(frozen=True)
class Embedded:
    """Access to the embed stage's tables for one embedding (models and limits)."""

    embedding: str

    def images_path(self, part: Part) -> str:
        return f"embed/images/{embedded_name(part.fingerprint, self.embedding)}.parquet"

    def vectors_path(self, part: Part) -> str:
        return f"embed/vectors/{embedded_name(part.fingerprint, self.embedding)}.parquet"

    def vectors(
        self, store: Store, part: Part, column: str
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Image numbers (n,) and unit rows (n, D) of one part; rejected images have none."""
        table = read_table(store, self.vectors_path(part), columns=["row", column])
        rows = column_bytes(table, column).view(np.float16).astype(np.float32)
        return part.base + column_numpy(table, "row"), rows


def column_numpy(table: pa.Table, name: str) -> npt.NDArray[np.int64]:
    """An integer column without nulls as int64."""
    values: npt.NDArray[np.int64] = table[name].to_numpy().astype(np.int64)
    return values


def column_bytes(table: pa.Table, name: str) -> npt.NDArray[np.uint8]:
    """A fixed-size-binary column as (n, width) bytes; where it is null they mean nothing."""
    width = table.schema.field(name).type.byte_width
    rows: npt.NDArray[np.uint8] = np.empty((len(table), width), np.uint8)
    start = 0
    for chunk in table[name].chunks:
        data = np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, width)
        rows[start : start + len(chunk)] = data[chunk.offset : chunk.offset + len(chunk)]
        start += len(chunk)
    return rows


@dataclass(frozen=True)
class VectorView:
    """One column of the vectors: of all images, `distinct` (no exact copies) or `kept` ones."""

    embedded: Embedded
    column: str
    only: str = "all"

    def load(
        self, store: Store, part: Part
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Image numbers (n,) and unit rows (n, D) of one part."""
        numbers, rows = self.embedded.vectors(store, part, self.column)
        if self.only == "distinct":
            copies = column_numpy(rows_of_part(store, EXACT_TABLE, part), "image")
            mask = ~np.isin(numbers, copies)
        elif self.only == "kept":
            kept = read_decisions(store, part)["decision"].to_numpy(zero_copy_only=False) == "kept"
            mask = kept[numbers - part.base]
        else:
            return numbers, rows
        return numbers[mask], rows[mask]


def decisions_path(part: Part) -> str:
    return f"dedup/decisions/{part.part:06d}.parquet"


def read_decisions(store: Store, part: Part) -> pa.Table:
    """The decisions of one part, row-aligned with its images."""
    return read_table(store, decisions_path(part))


def rows_of_part(store: Store, path: str, part: Part) -> pa.Table:
    """The rows of a table sorted by `image` whose images lie in one part."""
    between = [("image", ">=", part.base), ("image", "<", part.base + part.rows)]
    return read_table(store, path, filters=between)


def ids_of(
    store: Store, embedded: Embedded, parts: list[Part], numbers: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint8]:
    """The ids (n, 32) of images of `parts` by number, in the order given."""
    wanted, inverse = np.unique(numbers, return_inverse=True)
    ids = np.zeros((len(wanted), 32), np.uint8)

    def read(where: tuple[Part, slice]) -> npt.NDArray[np.uint8]:
        part, block = where
        table = read_table(store, embedded.images_path(part), columns=["id"])
        return column_bytes(table, "id")[wanted[block] - part.base]

    for (_, block), found in overlapped(list(by_part(parts, wanted)), read):
        ids[block] = found
    return ids[inverse]


def first_of_equal(
    numbers: npt.NDArray[np.int64], ids: npt.NDArray[np.uint8]
) -> npt.NDArray[np.int64]:
    """For rising image numbers (n,) with ids (n, 32): the smallest number with the same id (n,)."""
    _, first, inverse = np.unique(ids, axis=0, return_index=True, return_inverse=True)
    firsts: npt.NDArray[np.int64] = numbers[first][inverse.ravel()]
    return firsts


def by_part(parts: list[Part], numbers: npt.NDArray[np.int64]) -> Iterator[tuple[Part, slice]]:
    """Which slice of the sorted `numbers` lies in each part; parts without any are left out."""
    for part in parts:
        start, stop = np.searchsorted(numbers, [part.base, part.base + part.rows])
        if start < stop:
            yield part, slice(int(start), int(stop))


def usable_images(store: Store, embedded: Embedded, part: Part) -> npt.NDArray[np.bool_]:
    """Which images of a part have no fault (rows,)."""
    table = read_table(store, embedded.images_path(part), columns=["fault"])
    usable: npt.NDArray[np.bool_] = table["fault"].is_null().to_numpy(zero_copy_only=False)
    return usable
