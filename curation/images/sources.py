"""Where images come from: files of a folder, members of WebDataset tars, rows of Parquet files.

Format knowledge only: everything here works on an open file or a name, whoever opened it.
"""

import itertools
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

IMAGE_EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "content", "img")
KEY_COLUMNS = ("key", "__key__", "id", "path", "file_name", "filename", "url")
MAX_BRACES = 1_000_000


@dataclass(frozen=True)
class Member:
    """An image that was found: its exact name, where its bytes lie, and the members beside it."""

    name: str  # may hold surrogate escapes: names need not be UTF-8
    offset: int
    size: int
    extras: list[dict[str, str | int]] = field(default_factory=list)
    fault: str | None = None


def readable(name: str) -> str:
    """A name as text: bytes that aren't UTF-8 are escaped as \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def kind_of(name: str) -> str | None:
    """`folder` for an image file, `webdataset` for a tar, `parquet`, or None for anything else."""
    lower = name.lower()
    if lower.endswith((".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")):
        return "webdataset"
    if lower.endswith((".parquet", ".pq")):
        return "parquet"
    return "folder" if _extension(lower) in IMAGE_EXTENSIONS else None


def _extension(name: str) -> str:
    return "." + name.rpartition(".")[2].lower()


def expand_braces(uri: str) -> list[str]:
    """`a-{00..12}.tar` and `{x,y}.tar` as the shell would. Errors: ValueError."""
    match = re.search(r"\{([^{}]*)\}", uri)
    if match is None:
        return [uri]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        low, high = int(span[1]), int(span[2])
        if not 0 <= high - low < MAX_BRACES:
            raise ValueError(f"{uri}: the range {match[0]} must rise, by at most {MAX_BRACES:,}")
        width = len(span[1]) if span[1].startswith("0") else 0
        choices = [str(i).zfill(width) for i in range(low, high + 1)]
    elif "," in match[1]:
        choices = match[1].split(",")
    else:
        return [uri]  # braces that are part of a name
    heads = (uri[: match.start()] + choice + uri[match.end() :] for choice in choices)
    return list(itertools.chain.from_iterable(expand_braces(head) for head in heads))


def scan_tar(file: BinaryIO, size: int) -> Iterator[Member]:
    """The images of a WebDataset tar of `size` bytes, with the offsets of their bytes.

    Members that share an image's key (the name up to its first dot) come as its extras. What is
    damaged comes as members with a fault, the last one named "" when the archive itself is.
    """
    magic = file.read(2)
    file.seek(0)
    for start, name in COMPRESSED.items():
        if magic == start:
            yield Member("", 0, 0, fault=f"compressed_archive {name}; store it uncompressed")
            return
    if size == 0:
        yield Member("", 0, 0, fault="empty_archive")
        return
    for _, group in itertools.groupby(_tar_members(file, size), key=lambda m: _sample_key(m.name)):
        yield from _images_of(list(group))


def _tar_members(file: BinaryIO, size: int) -> Iterator[Member]:
    try:
        with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
            for info in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # a tar may hold millions
                if info.isdir():
                    continue
                fault = _member_fault(info, size)
                yield Member(info.name, info.offset_data, info.size, fault=fault)
            file.seek(tar.offset - tarfile.BLOCKSIZE if tar.offset >= size else tar.offset)
            rest = file.read(tarfile.BLOCKSIZE)
            if tar.offset < size and rest.strip(b"\0"):
                yield Member("", tar.offset, 0, fault=f"corrupt_archive at byte {tar.offset}")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        yield Member("", 0, 0, fault=f"truncated_archive {error}")


def _member_fault(info: tarfile.TarInfo, size: int) -> str | None:
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "unsafe_name the member's name leaves the archive"
    if not info.isreg():
        return "not_a_file the member is a link or a device"
    if info.offset_data + info.size > size:
        return "truncated_archive the file ends inside this member"
    return None


def _sample_key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _images_of(group: list[Member]) -> Iterator[Member]:
    """The image members of one WebDataset sample, each with the sample's other members."""
    if group[0].name == "":
        yield from group
        return
    images, extras = [], []
    for member in group:
        ext = member.name.rpartition("/")[2].partition(".")[2]
        if f".{ext.lower()}" in IMAGE_EXTENSIONS or (
            len(group) == 1 and _extension(member.name) in IMAGE_EXTENSIONS
        ):
            images.append(member)
        elif member.fault is None:
            extras.append({"ext": ext, "offset": member.offset, "size": member.size})
    for image in images:
        yield Member(image.name, image.offset, image.size, extras, image.fault)


@dataclass(frozen=True)
class ImageColumn:
    """Where a Parquet file keeps its images: a binary column, or a struct with `bytes`."""

    path: str  # as pyarrow's `columns=` wants it
    name: str
    nested: bool
    key: str | None


def image_column(schema: pa.Schema) -> ImageColumn | None:
    """The column with image bytes: a known name first, else the only binary column."""

    def is_bytes(kind: pa.DataType) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    def is_struct(kind: pa.DataType) -> bool:
        return bool(
            pa.types.is_struct(kind)
            and kind.get_field_index("bytes") >= 0
            and is_bytes(kind.field("bytes").type)
        )

    found = [f.name for f in schema if is_bytes(f.type) or is_struct(f.type)]
    named = [name for name in IMAGE_COLUMNS if name in found]
    if not named and len(found) != 1:
        return None
    name = (named or found)[0]
    nested = is_struct(schema.field(name).type)
    texts = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_integer(f.type)]
    key = next((k for k in KEY_COLUMNS if k in texts), None)
    return ImageColumn(f"{name}.bytes" if nested else name, name, nested, key)


def scan_parquet(file: BinaryIO) -> Iterator[list[Member]]:
    """The rows of a Parquet file, one list a row group; a member's offset is its row number."""
    try:
        parquet = pq.ParquetFile(file)
        column = image_column(parquet.schema_arrow)
        if column is None:
            yield [
                Member("", 0, 0, fault="no_image_column name it one of " + ", ".join(IMAGE_COLUMNS))
            ]
            return
        row = 0
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            names = [f"row-{row + i:09d}" for i in range(count)]
            if column.key is not None:
                keys = parquet.read_row_group(group, columns=[column.key])[column.key].to_pylist()
                names = [n if k is None else str(k) for n, k in zip(names, keys, strict=True)]
            yield [Member(name, row + i, -1) for i, name in enumerate(names)]
            row += count
    except (pa.ArrowException, OSError) as error:
        yield [Member("", 0, 0, fault=f"corrupt_archive {' '.join(str(error).split())[:200]}")]


def read_parquet_rows(
    file: BinaryIO, first: int, count: int
) -> Iterator[tuple[bytes | None, dict[str, object]]]:
    """Image bytes and the row's plain columns of `count` rows from row `first`, streamed."""
    parquet = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    column = image_column(parquet.schema_arrow)
    assert column is not None
    plain = [
        f.name
        for f in parquet.schema_arrow
        if pa.types.is_string(f.type) or pa.types.is_primitive(f.type)
    ]
    groups, start, skip = [], 0, 0
    for group in range(parquet.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if start + rows > first and start < first + count:
            if not groups:
                skip = first - start
            groups.append(group)
        start += rows
    batches = parquet.iter_batches(batch_size=32, row_groups=groups, columns=[column.path, *plain])
    rows_seen = 0
    for batch in batches:
        for value in batch.to_pylist():
            if skip <= rows_seen < skip + count:
                image = value.pop(column.name)
                if column.nested:
                    image = (image or {}).get("bytes")
                yield image, value
            rows_seen += 1
