"""Lists of URLs: text (one a line), CSV or TSV with a header, Parquet. Format knowledge only."""

import csv
import io
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from curation.images.sources import PARQUET_ERRORS

URL_COLUMNS = ("url", "image_url", "img_url", "uri", "link", "image")
LIST_EXTENSIONS = (".txt", ".csv", ".tsv", ".parquet", ".pq")
LONGEST_LINE = 1 << 16

Listed = tuple[str, dict[str, Any]]  # a URL and the other columns of its row


class UrlListError(Exception):
    """A file that is no list of URLs: what is wrong with it, and what would be right."""


def is_url_list(name: str) -> bool:
    return name.lower().endswith(LIST_EXTENSIONS)


def read_urls(file: BinaryIO, name: str) -> Iterator[Listed]:
    """The rows of a list, streamed. Raises UrlListError."""
    lower = name.lower()
    if lower.endswith((".parquet", ".pq")):
        yield from _parquet(file)
    elif lower.endswith((".csv", ".tsv")):
        yield from _csv(file, "\t" if lower.endswith(".tsv") else ",")
    else:
        yield from _text(file)


def _text(file: BinaryIO) -> Iterator[Listed]:
    """Empty lines and lines that begin with # are passed over."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE or b"\0" in line:
            raise UrlListError(f"line {number} is no text; a list has one URL a line")
        url = line.decode("utf-8-sig" if number == 1 else "utf-8", "backslashreplace").strip()
        if url and not url.startswith("#"):
            yield url, {}


def _csv(file: BinaryIO, delimiter: str) -> Iterator[Listed]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="backslashreplace", newline="")
    reader = csv.DictReader(text, delimiter=delimiter, restkey="")
    try:
        column = _url_column(reader.fieldnames or [])
        for row in reader:
            row.pop("", None)
            url = (row.pop(column) or "").strip()
            if url:
                yield url, row
    except csv.Error as error:
        raise UrlListError(f"line {reader.line_num}: {error}") from None
    finally:
        text.detach()


def _parquet(file: BinaryIO) -> Iterator[Listed]:
    try:
        parquet = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
        schema = parquet.schema_arrow
        column = _url_column([f.name for f in schema if _is_text(f.type)])
        plain = [f.name for f in schema if _is_text(f.type) or pa.types.is_primitive(f.type)]
        for batch in parquet.iter_batches(batch_size=1024, columns=plain, use_threads=False):
            for row in batch.to_pylist():
                url = (row.pop(column) or "").strip()
                if url:
                    yield url, row
    except PARQUET_ERRORS as error:
        raise UrlListError(f"not a sound Parquet file: {' '.join(str(error).split())}") from None


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _url_column(names: Any) -> str:
    for wanted in URL_COLUMNS:
        for name in names:
            if name.strip().lower() == wanted:
                return str(name)
    given = ", ".join(str(name)[:40] for name in list(names)[:10]) or "none"
    raise UrlListError(f"no column of URLs; name it one of {', '.join(URL_COLUMNS)} (has: {given})")
