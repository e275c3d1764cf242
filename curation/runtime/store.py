"""Where a run and its sources live: a local folder or an s3:// prefix, behind one small interface.

A write is all or nothing: a local file is written beside its place, synced and renamed; on S3 the
object appears with the completed PUT. A reader never sees half a file.
"""

import contextlib
import errno
import fcntl
import io
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

DISK_FULL = "the disk is full"
REQUESTS = 16  # that one process has under way where many are independent
# tempfile's names; an image of the user's that begins alike has an extension
SCRATCH = re.compile(r"\.tmp-[a-z0-9_]{8}")


class StoreError(Exception):
    """A location that can't be used: says which, what is wrong and what would be right."""


@dataclass(frozen=True)
class Entry:
    """A file of a store: path below the root, bytes, and a version that changes with the content.

    `fault` tells why a file or folder that was found can't be read.
    """

    path: str
    size: int
    version: str
    fault: str = ""


class Store(Protocol):
    """Files below one root. Paths are relative and use `/`."""

    uri: str

    def exists(self, path: str) -> bool: ...
    def stat(self, path: str) -> Entry: ...
    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes: ...
    def open(self, path: str) -> BinaryIO: ...
    def write(self, path: str, data: bytes) -> None: ...
    def publish(self, path: str) -> contextlib.AbstractContextManager[Path]: ...
    def append(self, path: str, data: bytes) -> None: ...
    def delete(self, path: str) -> None: ...
    def list(self, prefix: str = "") -> Iterator[Entry]: ...
    def folders(self, path: str = "") -> Sequence[str]: ...
    def link(self, path: str, seconds: int) -> str | None: ...
    def locate(self, path: str) -> str: ...


def open_store(uri: str) -> Store:
    """`s3://bucket/prefix` or a local folder (which need not exist yet)."""
    if uri.startswith("s3://"):
        from curation.runtime.s3 import S3Store

        return S3Store(uri)
    if "://" in uri and not uri.startswith("file://"):
        scheme = uri.split("://")[0]
        raise StoreError(f"{uri}: can't read {scheme}://; use a local path or s3://bucket/prefix")
    return FileStore(uri.removeprefix("file://"))


def split_uri(uri: str) -> tuple[str, str]:
    """A file's uri as (root for `open_store`, path below it)."""
    root, _, name = uri.rstrip("/").rpartition("/")
    return (root or ("/" if uri.startswith("/") else ".")), name


def read_uri(uri: str) -> bytes:
    """A whole file by its uri. Errors: StoreError."""
    root, name = split_uri(uri)
    return open_store(root).read(name)


def delete_all(store: Store, paths: Iterable[str]) -> None:
    """Deletes some files, `REQUESTS` at a time."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        for _ in pool.map(store.delete, paths):
            pass


def reason(path: Path | str, error: OSError) -> StoreError:
    """An error of the operating system as one line for people."""
    advice = {
        errno.ENOSPC: f"{DISK_FULL}; free some space and run again, finished parts are kept",
        errno.EDQUOT: f"{DISK_FULL} (its quota); free some space and run again",
        errno.EACCES: "permission denied",
        errno.EROFS: "the file system is read-only",
        errno.ENOENT: "no such file",
        errno.ELOOP: "a symbolic link that points to itself",
        errno.EISDIR: "a folder, not a file",
        errno.ENOTDIR: "a file stands where a folder is needed",
        errno.EEXIST: "a file stands where a folder is needed",
    }
    text = advice.get(error.errno or 0, error.strerror or str(error))
    return StoreError(f"{os.fsencode(path).decode('utf-8', 'backslashreplace')}: {text}")


class FileStore:
    """A folder. Names may be any bytes: they travel as str with surrogate escapes."""

    def __init__(self, root: str) -> None:
        self.root = Path(root).expanduser().absolute()
        self.uri = str(self.root)

    def locate(self, path: str) -> str:
        """The full readable location of `path`."""
        return str(self.root / path) if path else self.uri

    def exists(self, path: str) -> bool:
        return os.path.exists(self.root / path)

    def stat(self, path: str) -> Entry:
        try:
            return _entry(path, os.stat(self.root / path))
        except OSError as error:
            raise reason(self.root / path, error) from None

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        try:
            with open(os.path.join(self.uri, path), "rb", buffering=0) as file:
                if start:
                    file.seek(start)
                return file.readall() if length is None else _read_exactly(file, length)
        except OSError as error:
            raise reason(self.root / path, error) from None

    def open(self, path: str) -> BinaryIO:
        try:
            return open(self.root / path, "rb")
        except OSError as error:
            raise reason(self.root / path, error) from None

    def write(self, path: str, data: bytes) -> None:
        with self.publish(path) as temporary:
            temporary.write_bytes(data)

    @contextlib.contextmanager
    def publish(self, path: str) -> Iterator[Path]:
        """Yields a scratch file; when the block ends well it is synced and renamed to `path`."""
        target = self.root / path
        scratch: Path | None = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".tmp-", dir=target.parent)
            scratch = Path(name)
            os.fchmod(handle, 0o666 & ~_UMASK)
            os.close(handle)
            yield scratch
            with open(scratch, "rb") as file:
                os.fsync(file.fileno())
            os.replace(scratch, target)
        except OSError as error:
            raise reason(target, error) from None
        finally:
            if scratch is not None:
                scratch.unlink(missing_ok=True)

    def append(self, path: str, data: bytes) -> None:
        target = self.root / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "ab", buffering=0) as file:
                start, rest = file.tell(), memoryview(data)
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    file.truncate(start)  # no half line stays when the disk is full
                    raise
        except OSError as error:
            raise reason(target, error) from None

    def delete(self, path: str) -> None:
        try:
            (self.root / path).unlink(missing_ok=True)
        except OSError as error:
            raise reason(self.root / path, error) from None

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All files below `prefix`, sorted by folder. Linked folders are followed, loops are not.

        Scratch files of killed writers are left out; what can't be read comes with its fault.
        """
        if os.path.isdir(self.root / prefix):
            yield from self._walk(prefix, ())

    def folders(self, path: str = "") -> Sequence[str]:
        """The names of the folders directly in `path`, sorted; none if it can't be read."""
        try:
            with os.scandir(self.root / path) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except OSError:
            return []

    def link(self, path: str, seconds: int) -> str | None:  # noqa: ARG002 (S3 has links)
        """A folder has no links that others could follow."""
        return None

    def _walk(self, folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
        try:
            info = os.stat(self.root / folder)
            names = sorted(os.listdir(self.root / folder))
        except OSError as error:
            yield _unreadable(folder, error)
            return
        here = (info.st_dev, info.st_ino)
        if here in above:
            yield Entry(folder, 0, "", "unreadable a link back to a folder that holds it")
            return
        for name in names:
            path = f"{folder}/{name}" if folder else name
            if SCRATCH.fullmatch(name):
                continue
            try:
                found = os.stat(self.root / path)
            except OSError as error:
                yield _unreadable(path, error)
                continue
            if stat.S_ISDIR(found.st_mode):
                yield from self._walk(path, (*above, here))
            else:
                yield _entry(path, found)


def _unreadable(path: str, error: OSError) -> Entry:
    return Entry(path, 0, "", "unreadable " + str(reason("", error)).removeprefix(": "))


def _entry(path: str, info: os.stat_result) -> Entry:
    # Opening a pipe would wait for a writer for ever, reading a device never ends.
    special = not (stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode))
    fault = "not_a_file a pipe, a socket or a device" if special else ""
    return Entry(path, info.st_size, f"{info.st_mtime_ns}-{info.st_size}", fault)


@contextlib.contextmanager
def hold(store: Store, folders: Sequence[str]) -> Iterator[None]:
    """One writer at a time in a run; scratch files that killed ones left in a folder are removed.

    Raises StoreError when another process holds the run.
    """
    if not isinstance(store, FileStore):
        from curation.runtime.lease import lease
        from curation.runtime.s3 import S3Store

        assert isinstance(store, S3Store)
        with lease(store):
            yield
        return
    with _lock(store):
        _sweep(store, folders)
        try:
            yield
        finally:
            _sweep(store, folders)  # of workers that died while the run went on


def _sweep(store: FileStore, folders: Sequence[str]) -> None:
    below = (scratch for name in folders for scratch in (store.root / name).rglob(".tmp-*"))
    for scratch in [*store.root.glob(".tmp-*"), *below]:
        scratch.unlink(missing_ok=True)


def _lock(store: FileStore) -> BinaryIO:
    try:
        store.root.mkdir(parents=True, exist_ok=True)
        file = open(store.root / ".lock", "wb")  # noqa: SIM115 (the caller closes it)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it, however we end
    except BlockingIOError:
        raise StoreError(f"{store.uri}: another process is writing this run; wait for it") from None
    except OSError as error:
        raise reason(store.root, error) from None
    return file


def _current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _current_umask()


def _read_exactly(file: io.FileIO, length: int) -> bytes:
    data = file.read(length)
    while len(data) < length and (more := file.read(length - len(data))):
        data += more
    return data


def read_table(
    store: Store,
    path: str,
    columns: list[str] | None = None,
    row_group: int | None = None,
    filters: Any = None,
) -> pa.Table:
    """A Parquet table, or one row group of it."""
    with store.open(path) as file:
        if row_group is not None:
            return pq.ParquetFile(file).read_row_group(row_group, columns=columns)
        # Arrow's threads still close a Python file when this returns, and abort a process that
        # ends meanwhile (apache/arrow issues 33975, 34314): so none.
        return pq.read_table(
            file, columns=columns, filters=filters, use_threads=False, pre_buffer=False
        )


def write_table(
    store: Store, path: str, table: pa.Table, row_group_size: int | None = None
) -> None:
    """Publishes a Parquet table; vectors stay uncompressed, the rest is zstd."""
    with store.publish(path) as scratch:
        pq.write_table(
            table,
            scratch,
            compression=compression(table.schema),
            use_dictionary=False,
            row_group_size=row_group_size,
        )


def compression(schema: pa.Schema) -> dict[str, str]:
    """Column compression: none for fixed-size binary, zstd for everything else."""
    return {
        field.name: "none" if pa.types.is_fixed_size_binary(field.type) else "zstd"
        for field in schema
    }
