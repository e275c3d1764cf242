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
# A tar begins with its first member's name, which may be BZh.jpg: only whole signatures count.
COMPRESSED = {
    "gzip": rb"\x1f\x8b\x08",
    "bzip2": rb"BZh[1-9]1AY&SY",
    "xz": rb"\xfd7zXZ\0",
    "zstd": rb"\x28\xb5\x2f\xfd",
}
SIGNATURE_BYTES = 16
TAIL_BLOCK = 1 << 20
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "content", "img")
KEY_COLUMNS = ("key", "__key__", "id", "path", "file_name", "filename", "url")
MAX_BRACES = 1_000_000
# What pyarrow raises on damaged files; its KeyError is for a column named twice.
PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError)


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
    whole = itertools.chain.from_iterable(expand_braces(head) for head in heads)
    found = list(itertools.islice(whole, MAX_BRACES + 1))
    if len(found) > MAX_BRACES:
        raise ValueError(f"{uri}: its braces name more than {MAX_BRACES:,} files")
    return found


def scan_tar(file: BinaryIO, size: int) -> Iterator[Member]:
    """The images of a WebDataset tar of `size` bytes, with the offsets of their bytes.

    Members that share an image's key (the name up to its first dot) come as its extras. What is
    damaged comes as members with a fault, the last one named "" when the archive itself is.
    """
    signature = file.read(SIGNATURE_BYTES)
    file.seek(0)
    for name, pattern in COMPRESSED.items():
        if re.match(pattern, signature):
            yield Member("", 0, 0, fault=f"compressed_archive {name}; store it uncompressed")
            return
    empty, images = True, False
    groups = itertools.groupby(
        _tar_members(file, size), key=lambda m: (m.name == "", _sample_key(m.name))
    )
    for _, group in groups:
        empty = False
        for image in _images_of(list(group)):
            images = True
            yield image
    if empty:
        yield Member("", 0, 0, fault="empty_archive it has no members")
    elif not images:
        yield Member("", 0, 0, fault="no_images none of its members is an image")


def _tar_members(file: BinaryIO, size: int) -> Iterator[Member]:
    if size == 0:
        return
    try:
        with tarfile.open(
            fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as tar:
            end = -1
            for info in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # a tar may hold millions
                if info.size < 0 or tar.offset <= end:
                    raise ValueError("a header that leads backwards")
                end = tar.offset
                if not info.isdir():
                    fault = _member_fault(info, size)
                    yield Member(info.name, info.offset_data, info.size, fault=fault)
            # tarfile stops without a word at a damaged header, and where another tar is appended.
            file.seek(tar.offset)
            while block := file.read(TAIL_BLOCK):
                if block.strip(b"\0"):
                    fault = f"corrupt_archive no header where one should be, at byte {tar.offset}"
                    yield Member("", tar.offset, 0, fault=fault)
                    break
    except (tarfile.TarError, OSError, ValueError, ArithmeticError, RecursionError) as error:
        reason = "truncated" if re.search("truncated|unexpected end", str(error)) else "corrupt"
        yield Member("", 0, 0, fault=f"{reason}_archive {error}")


def _member_fault(info: tarfile.TarInfo, size: int) -> str | None:
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "unsafe_name the member's name leaves the archive"
    if not info.isreg() or info.issparse():
        return "not_a_file the member is a link, a device or sparse"
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
    exts = [member.name.rpartition("/")[2].partition(".")[2] for member in group]
    chosen = [f".{ext.lower()}" in IMAGE_EXTENSIONS for ext in exts]
    if not any(chosen):  # names such as photo.v2.jpg, which aren't WebDataset's
        chosen = [_extension(ext) in IMAGE_EXTENSIONS for ext in exts]
    images, extras = [], []
    for member, ext, is_image in zip(group, exts, chosen, strict=True):
        if is_image:
            images.append(member)
        elif member.fault is None:
            place: dict[str, str | int] = {"offset": member.offset, "size": member.size}
            extras.append({"ext": readable(ext), **place})
    for image in images:
        yield Member(image.name, image.offset, image.size, extras, image.fault)


@dataclass(frozen=True)
class ImageColumn:
    """Where a Parquet file keeps its images: a binary column, or a struct with `bytes`."""

    path: str  # as pyarrow's `columns=` wants it
    name: str
    nested: bool
    key: str | None


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    types = pa.types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    types = pa.types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _is_struct(kind: pa.DataType) -> bool:
    """Hugging Face's image feature: a struct of `bytes` and `path`."""
    return bool(
        pa.types.is_struct(kind)
        and kind.get_field_index("bytes") >= 0
        and _is_bytes(kind.field("bytes").type)
    )


def image_column(schema: pa.Schema) -> ImageColumn | None:
    """The column with image bytes: a known name first, else the only binary column."""
    found = [f.name for f in schema if _is_bytes(f.type) or _is_struct(f.type)]
    named = [name for name in IMAGE_COLUMNS if name in found]
    if not named and len(found) != 1:
        return None
    name = (named or found)[0]
    nested = _is_struct(schema.field(name).type)
    texts = [f.name for f in schema if _is_text(f.type) or pa.types.is_integer(f.type)]
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
            if count == 0:
                continue
            names = [f"row-{row + i:09d}" for i in range(count)]
            if column.key is not None:
                keys = parquet.read_row_group(group, columns=[column.key])[column.key].to_pylist()
                names = [n if k is None else str(k) for n, k in zip(names, keys, strict=True)]
            yield [Member(name, row + i, -1) for i, name in enumerate(names)]
            row += count
        if row == 0:
            yield [Member("", 0, 0, fault="empty_archive it has no rows")]
    except PARQUET_ERRORS as error:
        yield [Member("", 0, 0, fault=f"corrupt_archive {' '.join(str(error).split())[:200]}")]


def read_parquet_rows(
    file: BinaryIO, first: int, count: int
) -> Iterator[tuple[bytes | None, dict[str, object]]]:
    """Image bytes and the row's plain columns of `count` rows from row `first`, streamed."""
    parquet = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    column = image_column(parquet.schema_arrow)
    assert column is not None
    plain = [
        f.name for f in parquet.schema_arrow if _is_text(f.type) or pa.types.is_primitive(f.type)
    ]
    groups: list[int] = []
    start = skip = 0
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
