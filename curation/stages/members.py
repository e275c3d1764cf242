"""Members tables: one row an image that was found, a row group a part, digests in the footer."""

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation.images.sources import Member, readable
from curation.runtime.manifest import fingerprint
from curation.runtime.store import Store, compression
from curation.schema import MEMBERS

Row = tuple[str, str, Member, str]  # (uri of the file, its path below the root, member, version)


def merge(groups: Iterable[list[Row]], least: int) -> Iterator[list[Row]]:
    """Whole Parquet row groups until a part is full: a row group is only ever read once."""
    batch: list[Row] = []
    for group in groups:
        batch += group
        if len(batch) >= least:
            yield batch
            batch = []
    if batch:
        yield batch


def write_members(store: Store, table: str, rows: Iterable[Any], part_images: int) -> int:
    return write_groups(store, table, _chunks(rows, part_images))


def _chunks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def write_groups(store: Store, table: str, groups: Iterable[list[Row]]) -> int:
    """Streams members to a table, one row group a part; the parts' digests go into its footer."""
    total, digests = 0, []
    with (
        store.publish(table) as scratch,
        pq.ParquetWriter(scratch, MEMBERS, compression=compression(MEMBERS)) as writer,
    ):
        for group in groups:
            block = pa.Table.from_pylist([_row(*row) for row in group], schema=MEMBERS)
            writer.write_table(block, row_group_size=len(group))
            identity = [(p, m.name, m.offset, m.size, v, m.fault) for _, p, m, v in group]
            digests.append(fingerprint(identity))
            total += len(group)
        writer.add_key_value_metadata({"digests": json.dumps(digests)})
    return total


def _row(uri: str, path: str, member: Member, version: str) -> dict[str, Any]:
    return {
        "uri": uri,
        "key": readable(member.name),
        "locator": os.fsencode(path),
        "offset": member.offset,
        "size": member.size,
        "version": version,
        "extras": member.extras,
        "fault": member.fault,
    }
