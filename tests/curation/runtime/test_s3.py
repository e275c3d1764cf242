"""The S3 store over real HTTP: the same behaviour as the local one, and broken answers."""

import errno
import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
import pyarrow as pa
import pytest
from moto.server import ThreadedMotoServer

from curation.runtime.s3 import PART_BYTES, READ_AHEAD_BYTES, S3Store
from curation.runtime.store import DISK_FULL, StoreError, open_store, read_table, write_table


def use(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def store(port: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> S3Store:
    use(monkeypatch, port)
    bucket = f"b{abs(hash(request.node.name)) % 10**9}"
    boto3.Session().client("s3").create_bucket(Bucket=bucket)
    return S3Store(f"s3://{bucket}/some/prefix/")


@pytest.mark.parametrize("name", ["x", "a/b c+&%25.jpg", "ünï/绘画", "a//b", "-x"])
def test_what_is_written_is_listed_and_read_back(store: S3Store, name: str) -> None:
    store.write(name, b"0123456789")
    assert [(e.path, e.size, e.fault) for e in store.list()] == [(name, 10, "")]
    assert store.read(name) == b"0123456789"
    assert store.read(name, 3, 4) == b"3456"
    assert store.read(name, 8) == b"89"
    with store.open(name) as file:
        file.seek(5)
        assert file.read(3) == b"567"
        assert file.read() == b"89"
    store.append(name, b"+")
    assert store.read(name) == b"0123456789+"
    store.delete(name)
    assert not store.exists(name)


def test_a_prefix_is_a_folder_not_a_beginning(store: S3Store) -> None:
    store.write("pool/a", b"")
    store.write("pool2/b", b"")
    assert [e.path for e in store.list("pool")] == ["pool/a"]


def test_more_than_a_page_is_listed(store: S3Store) -> None:
    for number in range(1010):
        store.client.put_object(Bucket=store.bucket, Key=f"some/prefix/{number:04d}", Body=b"")
    assert len(list(store.list())) == 1010


def test_a_large_file_is_published_whole(store: S3Store) -> None:
    data = bytes(range(256)) * (PART_BYTES // 128)
    with store.publish("big") as scratch:
        scratch.write_bytes(data)
        assert not store.exists("big")
    assert store.read("big") == data


@pytest.mark.parametrize("size", [0, 5, READ_AHEAD_BYTES, 3 * READ_AHEAD_BYTES + 7])
def test_an_open_object_is_read_from_anywhere(store: S3Store, size: int) -> None:
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    store.write("x", data)
    with store.open("x") as file:
        assert file.seek(0, 2) == size
        for start in (0, size // 3, size - 3, size // 2, size - READ_AHEAD_BYTES - 10):
            file.seek(max(0, start))
            assert file.read(20) == data[max(0, start) :][:20]
        file.seek(0)
        assert file.read() == data


def test_a_small_table_is_one_request(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(store, "t.parquet", pa.table({"a": [1, 2, 3], "b": ["x", "y", "z"]}))
    asked = []
    client = store.client
    client.meta.events.register("before-send.s3", lambda request, **_: asked.append(request.method))
    assert read_table(store, "t.parquet", ["b"])["b"].to_pylist() == ["x", "y", "z"]
    assert asked == ["GET"]


def test_a_full_local_disk_publishes_nothing(store: S3Store) -> None:
    with pytest.raises(StoreError, match=DISK_FULL), store.publish("x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not store.exists("x")


def test_a_store_travels_to_other_processes(store: S3Store) -> None:
    store.write("x", b"data")
    assert pickle.loads(pickle.dumps(store)).read("x") == b"data"
    assert open_store(store.uri).read("x") == b"data"


@pytest.mark.parametrize("name", ["read", "stat", "open"])
def test_a_missing_object_is_named(store: S3Store, name: str) -> None:
    with pytest.raises(StoreError, match=f"^{store.uri}/none: no such object$"):
        getattr(store, name)("none")


def test_an_answer_that_breaks_off_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {"left": 2}

    class Flaky(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<ListBucketResult/>" if "list-type" in self.path else b"the whole body"
            cut = 3 if "list-type" not in self.path and broken["left"] > 0 else len(body)
            broken["left"] -= cut == 3
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:cut])

        def log_message(self, *arguments: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use(monkeypatch, server.server_port)
    try:
        assert S3Store("s3://lvd").read("x") == b"the whole body"
        broken["left"] = 99
        with pytest.raises(StoreError, match=r"^s3://lvd/x: "):
            S3Store("s3://lvd").read("x")
    finally:
        server.shutdown()
        server.server_close()
