"""S3 over real HTTP: the same behaviour as a folder's, and faults in one line."""

import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

import pretrain.storage
from pretrain.errors import UserError
from pretrain.storage import LocalStorage, S3Storage, open_storage

FILES = {"000000.tar": b"0123456789", "a/b c+&%25.jpg": b"abc", "ünï/绘画": b"", ".hidden": b"x"}


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


@pytest.fixture(params=["folder", "s3"])
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> LocalStorage | S3Storage:
    if request.param == "folder":
        for name, data in FILES.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
        return open_storage(str(tmp_path))
    use(monkeypatch, port)
    client = boto3.Session().client("s3")
    client.create_bucket(Bucket="bucket")
    for name, data in FILES.items():
        client.put_object(Bucket="bucket", Key=f"some/prefix/{name}", Body=data)
    client.put_object(Bucket="bucket", Key="some/prefix2/other", Body=b"")
    return open_storage("s3://bucket/some/prefix/")


def test_files_are_listed_and_read_by_range(storage: LocalStorage | S3Storage) -> None:
    visible = {name: data for name, data in FILES.items() if not name.startswith(".")}
    assert dict(storage.files()) == {name: len(data) for name, data in visible.items()}
    assert {name: storage.read(name) for name in visible} == visible
    assert storage.read("000000.tar", 3, 4) == b"3456"
    assert storage.read("000000.tar", 8, 4) == b"89"
    with storage.open("000000.tar") as file:
        file.seek(5)
        assert file.read(3) == b"567"
        assert file.read() == b"89"


def test_storage_travels_and_is_shared(
    storage: LocalStorage | S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain.storage, "OPEN_FILES", 1)
    copy = pickle.loads(pickle.dumps(storage))
    names = ["000000.tar", "a/b c+&%25.jpg"] * 100
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: copy.read(name, 0, 5), names))
    assert found == [FILES[name][:5] for name in names]


def test_what_is_missing_is_named(storage: LocalStorage | S3Storage) -> None:
    for ask in (storage.read, storage.open):
        with pytest.raises(UserError, match=r"none\.tar: no such (file|object)$"):
            ask("none.tar")


def test_a_missing_bucket_is_named(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, port)
    with pytest.raises(UserError, match=r"^s3://nowhere/x: bucket 'nowhere' does not exist$"):
        list(open_storage("s3://nowhere/x").files())
    with pytest.raises(UserError, match="no bucket named; write s3://bucket/prefix"):
        open_storage("s3://")


class Answers(BaseHTTPRequestHandler):
    """Sends what the test wants: broken bodies first, or one status for everything."""

    broken = 0
    status = 200

    def do_GET(self) -> None:
        body = b"the whole body"
        if self.status != 200:
            body = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
        cut = 3 if type(self).broken > 0 else len(body)
        type(self).broken -= 1
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])

    def log_message(self, *arguments: Any) -> None:
        return


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Answers]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use(monkeypatch, server.server_port)
    Answers.broken, Answers.status = 0, 200
    yield Answers
    server.shutdown()
    server.server_close()


def test_a_body_that_breaks_off_is_asked_for_again(answers: type[Answers]) -> None:
    answers.broken = 2
    assert S3Storage("s3://lvd").read("x") == b"the whole body"
    answers.broken = 99
    with pytest.raises(UserError, match=r"^s3://lvd/x: .*\(check AWS_ENDPOINT_URL and the netw"):
        S3Storage("s3://lvd").read("x")


def test_denied_access_is_told(answers: type[Answers]) -> None:
    answers.status = 403
    with pytest.raises(UserError, match=r"^s3://lvd: access denied; check the credentials and"):
        list(S3Storage("s3://lvd").files())


def test_no_server_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, 9)  # nothing listens there
    with pytest.raises(UserError, match=r"^s3://lvd: .*check AWS_ENDPOINT_URL and the network"):
        list(S3Storage("s3://lvd").files())


def test_lacking_credentials_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, 9)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match=r"^s3://lvd: .*\(set AWS_ACCESS_KEY_ID and AWS_SECRET_ACC"):
        list(S3Storage("s3://lvd").files())
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^s3://lvd: .*\(set AWS_ACCESS_KEY_ID and AWS_SECRET_ACC"):
        list(S3Storage("s3://lvd").files())
