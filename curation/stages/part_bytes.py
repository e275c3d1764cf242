"""The bytes of a part's images, in order, or the reason why an image has none."""

from collections.abc import Iterator
from typing import Any, BinaryIO

from curation.images.sources import PARQUET_ERRORS, read_parquet_rows
from curation.runtime.store import Store, StoreError, read_table
from curation.stages.tables import Part

NO_BYTES = "no_bytes the row holds no image"


def read_part(
    store: Store, part: Part, max_bytes: int
) -> Iterator[tuple[int, dict[str, Any], bytes | str]]:
    """(row, member, bytes or the reason why there are none) of a part, in order."""
    members = read_table(store, part.table, row_group=part.row_group).to_pylist()
    source = part.open_source(store)
    if part.kind == "parquet":
        yield from _read_rows(source, members)
        return
    archive: BinaryIO | None = None
    try:
        for row, member in enumerate(members):
            fault = member["fault"]
            if not fault and member["size"] > max_bytes:
                fault = f"too_large {member['size']} bytes, at most {max_bytes}"
            if fault:
                yield row, member, fault
                continue
            path = member["locator"].decode("utf-8", "surrogateescape")
            try:
                if part.kind == "folder":
                    yield row, member, source.read(path)
                    continue
                archive = archive or source.open(path)
                archive.seek(member["offset"])
                yield row, member, archive.read(member["size"])
            except (StoreError, OSError) as error:
                yield row, member, f"unreadable {str(error).rpartition(': ')[2]}"
    finally:
        if archive is not None:
            archive.close()


def _read_rows(
    source: Store, members: list[dict[str, Any]]
) -> Iterator[tuple[int, dict[str, Any], bytes | str]]:
    """The rows of a Parquet part. From where the file is damaged on, each says so."""
    fault, file = "", None
    path = members[0]["locator"].decode("utf-8", "surrogateescape")
    stream: Iterator[tuple[bytes | None, Any]] = iter(())
    for row, member in enumerate(members):
        data: bytes | None = None
        if not (fault or member["fault"]):
            try:
                if file is None:
                    file = source.open(path)
                    stream = read_parquet_rows(file, member["offset"], len(members) - row)
                data, _ = next(stream)
            except StopIteration:
                fault = "corrupt_archive it ends before this row"
            except StoreError as error:
                fault = f"unreadable {str(error).rpartition(': ')[2]}"
            except PARQUET_ERRORS as error:
                fault = f"corrupt_archive {' '.join(str(error).split())[:200]}"
        wrong = member["fault"] or fault
        yield row, member, wrong or (NO_BYTES if data is None else data)
    if file is not None:
        file.close()
