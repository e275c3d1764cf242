"""The S3 side of `store`: boto3 against any endpoint (AWS_ENDPOINT_URL), reads by range."""

import contextlib
import functools
import io
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

from curation.runtime.store import Entry, StoreError, reason

READ_AHEAD_BYTES = 1 << 20
PART_BYTES = 16 << 20
READ_TIMEOUT_S = 60
READ_ATTEMPTS = 6  # of a body that breaks off: botocore's own retries end with the headers
READ_WAIT_S = 0.1  # before the second attempt, twice as long before each later one
# Errors that no later request will heal: found by the first one, and told at once.
FATAL = {"NoSuchBucket", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}
# Answers to a conditional write whose condition does not hold.
REFUSED = {"PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "412", "409", "404"}

Settings = tuple[int, frozenset[tuple[str, str]], tuple[int, ...]]


def _settings() -> Settings:
    """What a client is made of: it can't cross a fork, and holds keys that a file gave it.

    Roles and tokens that expire are renewed by boto3. Keys in a file are not: they are read again
    when whoever keeps that file has written new ones.
    """
    files = {"AWS_SHARED_CREDENTIALS_FILE": "credentials", "AWS_CONFIG_FILE": "config"}
    written = []
    for variable, name in files.items():
        try:
            path = os.environ.get(variable) or f"~/.aws/{name}"
            written.append(os.stat(os.path.expanduser(path)).st_mtime_ns)
        except OSError:
            written.append(0)
    environment = frozenset((k, v) for k, v in os.environ.items() if k.startswith("AWS_"))
    return os.getpid(), environment, tuple(written)


@functools.lru_cache(maxsize=8)
def _client(bucket: str, settings: Settings) -> Any:  # noqa: ARG001
    """A patient client for `settings`.

    The first request is made by an impatient one: a wrong endpoint shows in seconds.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import ClientError

    def make(attempts: int, connect_timeout: int) -> Any:
        retries: Any = {"total_max_attempts": attempts, "mode": "adaptive"}
        config = Config(
            retries=retries,
            connect_timeout=connect_timeout,
            read_timeout=READ_TIMEOUT_S,
            max_pool_connections=32,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        return boto3.Session().client("s3", config=config)

    try:
        make(attempts=2, connect_timeout=5).list_objects_v2(Bucket=bucket, MaxKeys=1)
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") in FATAL:
            raise
    return make(attempts=9, connect_timeout=10)


@functools.lru_cache(maxsize=2)
def _public_client(endpoint: str, settings: Settings) -> Any:  # noqa: ARG001
    """Signs URLs of `endpoint`; it asks for nothing itself."""
    import boto3

    return boto3.Session().client("s3", endpoint_url=endpoint)


class S3Store:
    """A prefix of a bucket. Credentials and endpoint come from boto3's usual chain."""

    def __init__(self, uri: str) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if not bucket:
            raise StoreError(f"{uri}: no bucket named; write s3://bucket/prefix")
        self.uri = uri.rstrip("/")
        self.bucket, self.prefix = bucket, prefix.rstrip("/")

    @property
    def client(self) -> Any:
        """Use it within `_errors`."""
        return _client(self.bucket, _settings())

    def locate(self, path: str) -> str:
        return f"{self.uri}/{path}" if path else self.uri

    def _key(self, path: str) -> str:
        return "/".join(x for x in (self.prefix, path) if x)

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            ConnectTimeoutError,
            EndpointConnectionError,
        )

        try:
            yield
        except ClientError as error:
            raise StoreError(f"{self.locate(path)}: {self._explain(error)}") from None
        except (EndpointConnectionError, ConnectTimeoutError, ValueError) as error:
            raise StoreError(
                f"{self.locate(path)}: {error}; check AWS_ENDPOINT_URL and the network"
            ) from None
        except (BotoCoreError, Boto3Error) as error:
            raise StoreError(f"{self.locate(path)}: {' '.join(str(error).split())}") from None

    def _explain(self, error: Any) -> str:
        code = str(error.response.get("Error", {}).get("Code", ""))
        known = {
            "NoSuchBucket": f"bucket '{self.bucket}' does not exist",
            "404": "no such object",
            "NoSuchKey": "no such object",
            "AccessDenied": "access denied; check the credentials and the bucket's policy",
            "403": "access denied; check the credentials and the bucket's policy",
            "InvalidAccessKeyId": "the access key is not known; check AWS_ACCESS_KEY_ID",
            "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY",
            "ExpiredToken": "the session token has expired; refresh the credentials",
        }
        return known.get(code, str(error))

    def exists(self, path: str) -> bool:
        from botocore.exceptions import ClientError

        with self._errors(path):
            try:
                self.client.head_object(Bucket=self.bucket, Key=self._key(path))
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in ("404", "NoSuchKey"):
                    return False
                raise
        return True

    def stat(self, path: str) -> Entry:
        with self._errors(path):
            head = self.client.head_object(Bucket=self.bucket, Key=self._key(path))
        return Entry(path, int(head["ContentLength"]), str(head["ETag"]).strip('"'))

    def read(self, path: str, start: int = 0, length: int | None = None) -> bytes:
        if length is not None and length <= 0:
            return b""
        stop = "" if length is None else str(start + length - 1)
        return self._get(path, f"{start}-{stop}" if start or stop else "")[0]

    def _get(self, path: str, span: str) -> tuple[bytes, str]:
        """The bytes of a span (all: ""), and what the store says of where they lie."""
        from botocore.exceptions import (
            ClientError,
            IncompleteReadError,
            ReadTimeoutError,
            ResponseStreamingError,
        )

        where = {"Bucket": self.bucket, "Key": self._key(path)}
        where |= {"Range": f"bytes={span}"} if span else {}

        def get() -> tuple[bytes, str]:
            try:
                answer = self.client.get_object(**where)
            except ClientError as error:
                code = error.response.get("Error", {}).get("Code")
                if span.startswith("-") and code in ("InvalidRange", "416"):
                    return b"", ""  # an empty object has no last bytes
                raise
            return bytes(answer["Body"].read()), str(answer.get("ContentRange", ""))

        with self._errors(path):
            for attempt in range(READ_ATTEMPTS - 1):
                with contextlib.suppress(
                    IncompleteReadError, ReadTimeoutError, ResponseStreamingError
                ):
                    return get()
                time.sleep(READ_WAIT_S * 2**attempt * random.uniform(0.5, 1))  # noqa: S311
            return get()

    def open(self, path: str) -> BinaryIO:
        """A seekable file. Its end comes with its size: of a small table that is all."""
        data, place = self._get(path, f"-{READ_AHEAD_BYTES}")
        size = int(place.rpartition("/")[2]) if place else len(data)
        raw = _RangeReader(self, path, size, data)
        return cast(BinaryIO, io.BufferedReader(raw, READ_AHEAD_BYTES))

    def write(self, path: str, data: bytes) -> None:
        with self._errors(path):
            self.client.put_object(Bucket=self.bucket, Key=self._key(path), Body=data)

    def write_if(self, path: str, data: bytes, version: str) -> str | None:
        """Writes if the object's version still is this one ("": if there is none).

        Returns the new version, or None when it was another. `data` must be like no other: after an
        answer that was lost it tells whether it was written. Stores without conditions just write.
        """
        from botocore.exceptions import ClientError

        condition = {"IfMatch": f'"{version}"'} if version else {"IfNoneMatch": "*"}
        where = {"Bucket": self.bucket, "Key": self._key(path)}
        with self._errors(path):
            try:
                put = self.client.put_object(**where, Body=data, **condition)
            except ClientError as error:
                code = error.response.get("Error", {}).get("Code")
                if code == "NotImplemented":
                    put = self.client.put_object(**where, Body=data)
                elif code not in REFUSED:
                    raise
                elif not self.exists(path) or self.read(path) != data:
                    return None
                else:
                    put = self.client.head_object(**where)
        return str(put["ETag"]).strip('"')

    def age(self, path: str) -> tuple[Entry, float] | None:
        """An object and the seconds since it was written, by the store's clock; None without it."""
        from botocore.exceptions import ClientError

        with self._errors(path):
            try:
                head = self.client.head_object(Bucket=self.bucket, Key=self._key(path))
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in ("404", "NoSuchKey"):
                    return None
                raise
        now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
        entry = Entry(path, int(head["ContentLength"]), str(head["ETag"]).strip('"'))
        return entry, (now - head["LastModified"]).total_seconds()

    @contextlib.contextmanager
    def publish(self, path: str) -> Iterator[Path]:
        """Yields a local scratch file; when the block ends well it is uploaded as `path`."""
        from boto3.s3.transfer import TransferConfig

        with tempfile.TemporaryDirectory(prefix="lvd-") as folder:
            scratch = Path(folder) / "object"
            try:
                yield scratch
            except OSError as error:  # the local disk may be full
                raise reason(scratch, error) from None
            config = TransferConfig(multipart_chunksize=PART_BYTES, multipart_threshold=PART_BYTES)
            with self._errors(path):
                self.client.upload_file(str(scratch), self.bucket, self._key(path), Config=config)

    def append(self, path: str, data: bytes) -> None:
        """S3 can't append: the (small, single-writer) object is written again with `data` added."""
        before = self.read(path) if self.exists(path) else b""
        self.write(path, before + data)

    def delete(self, path: str) -> None:
        with self._errors(path):
            self.client.delete_object(Bucket=self.bucket, Key=self._key(path))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All objects below `prefix`, in pages, sorted by key."""
        start = self._key(prefix)
        cut = len(self.prefix) + 1 if self.prefix else 0
        with self._errors(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=f"{start}/" if start else ""
            )
            for page in pages:
                for item in page.get("Contents", []):
                    if not item["Key"].endswith("/"):
                        etag = str(item["ETag"]).strip('"')
                        yield Entry(item["Key"][cut:], int(item["Size"]), etag)

    def folders(self, path: str = "") -> Sequence[str]:
        """The names of the folders directly in `path`, sorted."""
        start = self._key(path)
        start = f"{start}/" if start else ""
        with self._errors(path):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=start, Delimiter="/"
            )
            found = [one["Prefix"] for page in pages for one in page.get("CommonPrefixes", [])]
        return sorted(prefix[len(start) : -1] for prefix in found)

    def link(self, path: str, seconds: int) -> str | None:
        """A URL that lets whoever has it read `path` for some seconds.

        Its endpoint is LVD_S3_PUBLIC_URL where readers know the store by another name than we do.
        """
        public = os.environ.get("LVD_S3_PUBLIC_URL")
        with self._errors(path):
            client = _public_client(public, _settings()) if public else self.client
            where = {"Bucket": self.bucket, "Key": self._key(path)}
            return str(client.generate_presigned_url("get_object", Params=where, ExpiresIn=seconds))


class _RangeReader(io.RawIOBase):
    """A seekable file over range reads; its last bytes are there already."""

    def __init__(self, store: S3Store, path: str, size: int, end: bytes) -> None:
        self._store, self._path, self._size, self._at = store, path, size, 0
        self._end, self._end_at = end, size - len(end)

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
        if self._at >= self._end_at:
            start = self._at - self._end_at
            data = self._end[start : start + len(buffer)]
        else:
            want = min(len(buffer), self._end_at - self._at)
            data = self._store.read(self._path, self._at, want)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
