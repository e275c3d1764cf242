"""Where shards and images lie: a local folder or s3://bucket/prefix, read by range.

Both kinds have the same four members and no base class; `Storage` is their type. They may be used
by several threads, travel to other processes by pickling, and never write.
"""

import contextlib
import errno
import io
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from pretrain.errors import UserError

OPEN_FILES = 128  # local ones; far below the usual limit of 1,024 a process
STREAM_BYTES = 8 << 20  # of one request when a whole object is read in order
READ_TIMEOUT_S = 60
BODY_ATTEMPTS = 6  # for a body that breaks off: botocore's own retries end with the headers
BODY_WAIT_S = 0.1  # before the second attempt, twice as long before each later one


def open_storage(uri: str) -> "LocalStorage | S3Storage":
    """`s3://bucket/prefix` or a local folder. Errors: UserError."""
    if uri.startswith("s3://"):
        return S3Storage(uri)
    if "://" in uri and not uri.startswith("file://"):
        scheme = uri.split("://")[0]
        raise UserError(f"{uri}: can't read {scheme}://; use a local path or s3://bucket/prefix")
    return LocalStorage(uri.removeprefix("file://"))


class _OpenFile:
    """A descriptor that is closed with its last reader, not while another thread reads it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self.number)


class LocalStorage:
    """A folder. Names are relative, use `/`, and may hold surrogate escapes."""

    remote = False

    def __init__(self, root: str) -> None:
        self.uri = root
        self._root = Path(root).expanduser().absolute()
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStorage, (self.uri,)

    def files(self) -> Iterator[tuple[str, int]]:
        """(name, bytes) of every file at any depth, in no order; hidden ones are left out."""
        if not self._root.is_dir():
            kind = "a file, not a folder" if self._root.exists() else "no such folder"
            raise UserError(f"{self.uri}: {kind}; name the folder that holds the data")
        folders: list[tuple[str, tuple[str, ...]]] = [("", ())]
        while folders:
            folder, above = folders.pop()
            try:
                real = os.path.realpath(self._root / folder)
                if real in above:
                    continue  # a link back to a folder that holds it
                with os.scandir(self._root / folder) as entries:
                    for entry in entries:
                        name = f"{folder}/{entry.name}" if folder else entry.name
                        if entry.name.startswith("."):
                            continue
                        if entry.is_dir():
                            folders.append((name, (*above, real)))
                        elif entry.is_file():
                            yield name, entry.stat().st_size
            except OSError as error:
                raise self._explain(folder, error) from None

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from `offset`, fewer where the file ends. Errors: UserError."""
        try:
            if length is None:
                return (self._root / name).read_bytes()
            file = self._open(name)  # held: another thread may put it out of the cache meanwhile
            return os.pread(file.number, length, offset)
        except OSError as error:
            raise self._explain(name, error) from None

    def open(self, name: str) -> BinaryIO:
        """For reading in order. Errors: UserError."""
        try:
            return open(self._root / name, "rb")
        except OSError as error:
            raise self._explain(name, error) from None

    def _open(self, name: str) -> _OpenFile:
        file = self._files.get(name)
        if file is not None:  # nearly always, so without the lock
            return file
        with self._lock:
            file = self._files.setdefault(name, _OpenFile(self._root / name))
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
            return file

    def _explain(self, name: str, error: OSError) -> UserError:
        known = {errno.ENOENT: "no such file", errno.EACCES: "permission denied"}
        text = known.get(error.errno or 0, error.strerror or str(error))
        path = os.fsencode(self._root / name).decode("utf-8", "backslashreplace")
        return UserError(f"{path}: {text}")


class S3Storage:
    """A prefix of a bucket. Credentials and endpoint come from boto3's usual chain."""

    remote = True

    def __init__(self, uri: str) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise UserError(f"{uri}: no bucket named; write s3://bucket/prefix")
        self.uri = uri.rstrip("/")
        self._bucket, self._prefix = bucket, prefix.strip("/")
        self._clients: dict[int, tuple[tuple[int, ...], Any]] = {}  # by attempts
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Storage, (self.uri,)

    def files(self) -> Iterator[tuple[str, int]]:
        """(name, bytes) of every object below the prefix, in no order. Errors: UserError."""
        start = f"{self._prefix}/" if self._prefix else ""
        with self._errors(""):
            pages = self._client(attempts=3).get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=start):
                for item in page.get("Contents", []):
                    name = item["Key"].removeprefix(start)
                    if not any(part.startswith(".") for part in name.split("/")):
                        yield name, int(item["Size"])

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from `offset`, fewer where the object ends. Errors: UserError."""
        from botocore.exceptions import (
            IncompleteReadError,
            ReadTimeoutError,
            ResponseStreamingError,
        )

        where = {"Bucket": self._bucket, "Key": self._key(name)}
        if length is not None:
            where["Range"] = f"bytes={offset}-{offset + length - 1}"
        with self._errors(name):
            client = self._client(attempts=9)
            for attempt in range(BODY_ATTEMPTS - 1):
                with contextlib.suppress(
                    IncompleteReadError, ReadTimeoutError, ResponseStreamingError
                ):
                    return bytes(client.get_object(**where)["Body"].read())
                time.sleep(BODY_WAIT_S * 2**attempt * random.uniform(0.5, 1))  # noqa: S311
            return bytes(client.get_object(**where)["Body"].read())

    def open(self, name: str) -> BinaryIO:
        """For reading in order. Errors: UserError, also while it is read."""
        with self._errors(name):
            head = self._client(attempts=9).head_object(Bucket=self._bucket, Key=self._key(name))
        raw = _Ranges(self, name, int(head["ContentLength"]))
        return cast(BinaryIO, io.BufferedReader(raw, STREAM_BYTES))

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _client(self, attempts: int) -> Any:
        """One a process, since clients can't cross a fork, and a new one when the files that keys
        come from are written anew. Few attempts show a wrong setting soon, many outlast a fault in
        the middle of a run."""
        now = (os.getpid(), *_credentials_written())
        with self._lock:
            made_of, client = self._clients.get(attempts, ((), None))
            if made_of != now:
                client = _connect(attempts)
                self._clients[attempts] = now, client
            return client

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            CredentialRetrievalError,
            NoCredentialsError,
            PartialCredentialsError,
        )

        where = f"{self.uri}/{name}" if name else self.uri
        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            raise UserError(f"{where}: {self._reason(code) or error}") from None
        except (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError) as error:
            text = " ".join(str(error).split())
            raise UserError(
                f"{where}: {text} (set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
            ) from None
        except (BotoCoreError, ValueError) as error:
            text = " ".join(str(error).split())
            raise UserError(f"{where}: {text} (check AWS_ENDPOINT_URL and the network)") from None

    def _reason(self, code: str) -> str | None:
        denied = "access denied; check the credentials and the bucket's policy"
        return {
            "NoSuchBucket": f"bucket '{self._bucket}' does not exist",
            "NoSuchKey": "no such object",
            "404": "no such object",
            "AccessDenied": denied,
            "403": denied,
            "InvalidAccessKeyId": "the access key is not known; check AWS_ACCESS_KEY_ID",
            "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
            "ExpiredToken": "the session token has expired; refresh the credentials",
        }.get(code)


def _connect(attempts: int) -> Any:
    import boto3
    from botocore.config import Config

    retries: Any = {"total_max_attempts": attempts, "mode": "standard"}
    config = Config(
        retries=retries,
        connect_timeout=5,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=32,
        response_checksum_validation="when_required",
    )
    return boto3.Session().client("s3", config=config)


def _credentials_written() -> tuple[int, ...]:
    """When the files that boto3 takes keys from were written; it reads them once."""
    written = []
    files = {"AWS_SHARED_CREDENTIALS_FILE": "credentials", "AWS_CONFIG_FILE": "config"}
    for variable, name in files.items():
        try:
            path = os.environ.get(variable) or f"~/.aws/{name}"
            written.append(os.stat(os.path.expanduser(path)).st_mtime_ns)
        except OSError:
            written.append(0)
    return tuple(written)


class _Ranges(io.RawIOBase):
    """A seekable file over range reads."""

    def __init__(self, storage: S3Storage, name: str, size: int) -> None:
        self._storage, self._name, self._size, self._at = storage, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        want = min(len(buffer), self._size - self._at)
        if want <= 0:
            return 0
        data = self._storage.read(self._name, self._at, want)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


Storage = LocalStorage | S3Storage
