"""The same pictures as a folder, tars, Parquet and all of them mixed; from disk and over S3."""

import hashlib
import io
import json
import os
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from workbench import Project

from curation.cli import main

TAKE_ALL = {"retrieve": ["as_is", {"sample": {"k": 100}}]}


def write_tar(path: Path, images: list[Path]) -> None:
    with tarfile.open(path, "w") as tar:
        for image in images:
            extras = {".txt": b"a caption", ".json": b'{"a": 1}'}
            for ext, data in {image.suffix: image.read_bytes(), **extras}.items():
                info = tarfile.TarInfo(f"in/{image.stem}{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def as_folder(images: list[Path], out: Path) -> str:
    for image in images:
        place = out / image.stem[-1] / image.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(image.read_bytes())
    return str(out)


def as_tars(images: list[Path], out: Path) -> str:
    for number in range(3):
        write_tar(out / f"x-{number:03d}.tar", images[number::3])
        pq.write_table(pa.table({"url": ["sidecar"]}), out / f"x-{number:03d}.parquet")
    return str(out / "x-{000..002}.tar")


def as_parquet(images: list[Path], out: Path) -> str:
    table = pa.table({"jpg": [i.read_bytes() for i in images], "key": [i.stem for i in images]})
    pq.write_table(table, out / "images.parquet", row_group_size=7)
    return str(out)


def as_img2dataset(images: list[Path], out: Path) -> str:
    as_tars(images, out)
    (out / "x-000_stats.json").write_text("{}")
    return str(out)


def as_img2dataset_files(images: list[Path], out: Path) -> str:
    (out / "00000").mkdir()
    for image in images:
        (out / "00000" / image.name).write_bytes(image.read_bytes())
        (out / "00000" / f"{image.stem}.json").write_text("{}")
    pq.write_table(pa.table({"url": ["sidecar"]}), out / "00000.parquet")
    return str(out)


def as_all(images: list[Path], out: Path) -> str:
    as_folder(images[:8], out / "files")
    write_tar(out / "some.tar", images[8:16])
    as_parquet(images[16:], out)
    return str(out)


def samples(data: bytes) -> dict[str, dict[str, bytes]]:
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            key, _, ext = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            found.setdefault(key, {})[ext] = file.read()
    return found


@pytest.mark.parametrize(
    "make", [as_folder, as_tars, as_parquet, as_img2dataset, as_img2dataset_files, as_all]
)
def test_each_form_of_source_gives_the_same_images(
    project: Callable[..., Project], make: Callable[[list[Path], Path], str]
) -> None:
    work = project(pool=range(24), shards={"images_per_shard": 100})
    work.recipe["sources"]["curated"]["wanted"] |= TAKE_ALL
    images = sorted((work.folder / "pool").iterdir())
    (work.folder / "given").mkdir()
    work.recipe["sources"]["pool"] = [{"uri": make(images, work.folder / "given")}]
    assert work.run() == 0
    rows = [row for row in work.lineage() if row["source"] == "pool"]
    assert all(row["decision"] == "selected" for row in rows)
    wanted = {hashlib.sha256(image.read_bytes()).hexdigest(): image for image in images}
    assert sorted(row["id"] for row in rows) == sorted(wanted)
    found = samples((work.run_folder / "shards" / "000000.tar").read_bytes())
    keys = {row["id"]: row["key"] for row in rows}
    for key, image in wanted.items():
        members = found[key]
        assert members.pop("jpg") == image.read_bytes()
        lineage = json.loads(members.pop("json"))
        assert lineage["key"] == keys[key]
        assert image.stem in lineage["key"]
        if make in (as_tars, as_img2dataset):
            assert members == {"txt": b"a caption", "source.json": b'{"a": 1}'}
        elif make is not as_all:
            assert members == {}
        if make is as_parquet:
            assert lineage["metadata"] == {"key": image.stem}


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 server over HTTP with an empty bucket `lvd`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    endpoint(monkeypatch, f"http://127.0.0.1:{port}")
    client = boto3.client("s3")
    client.create_bucket(Bucket="lvd")
    yield client
    server.stop()


def endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


def upload(client: Any, folder: Path, prefix: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "lvd", f"{prefix}/{path.relative_to(folder)}")


def outputs(read: Callable[[str], bytes], names: list[str]) -> dict[str, str]:
    return {name: hashlib.sha256(read(name)).hexdigest() for name in sorted(names)}


@pytest.mark.slow
def test_s3_sources_and_output_give_the_bytes_of_a_local_run(
    project: Callable[..., Project], s3: Any
) -> None:
    work = project(pool=range(24))
    given = work.folder / "given"
    given.mkdir()
    as_all(sorted((work.folder / "pool").iterdir()), given)
    (given / "files" / "ünï +&%25.jpg").write_bytes((work.folder / "pool/00001.jpg").read_bytes())
    (given / "bad.jpg").write_bytes(b"no image")
    (given / "cut.tar").write_bytes((given / "some.tar").read_bytes()[:5000])
    curated = work.recipe["sources"]["curated"]["wanted"]
    work.recipe["sources"]["pool"] = [{"uri": str(given)}]
    assert work.run() == 0
    shards = work.run_folder / "shards"
    local = outputs(lambda n: (shards / n).read_bytes(), [p.name for p in shards.glob("*.tar")])
    rows = {(r["key"], r["decision"], r["reason"], r["id"]) for r in work.lineage()}

    upload(s3, given, "given")
    upload(s3, work.folder / "curated", "curated")
    curated["uri"] = "s3://lvd/curated/"
    work.recipe["sources"]["pool"][0]["uri"] = "s3://lvd/given"
    work.recipe["output"] = "s3://lvd/runs/one"
    assert work.run() == 0

    def read(name: str) -> bytes:
        return bytes(s3.get_object(Bucket="lvd", Key=f"runs/one/shards/{name}")["Body"].read())

    listed = s3.list_objects_v2(Bucket="lvd", Prefix="runs/one/shards/")["Contents"]
    tars = [x["Key"].rpartition("/")[2] for x in listed if x["Key"].endswith(".tar")]
    assert outputs(read, tars) == local
    out = work.folder / "s3.parquet"
    assert main(["lineage", "s3://lvd/runs/one", "--out", str(out)]) == 0
    found = pq.read_table(out).to_pylist()
    assert {(r["key"], r["decision"], r["reason"], r["id"]) for r in found} == rows
    before = {x["Key"]: x["LastModified"] for x in listed}
    assert work.run() == 0
    listed = s3.list_objects_v2(Bucket="lvd", Prefix="runs/one/shards/")["Contents"]
    assert {x["Key"]: x["LastModified"] for x in listed} == before


def failed(work: Project, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a run that must fail within seconds."""
    start = time.monotonic()
    assert work.run() in (1, 2)
    assert time.monotonic() - start < 20
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("curate: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("field", "uri", "said"),
    [
        ("source", "s3://absent/pool", "bucket 'absent' does not exist"),
        ("source", "s3://lvd/nothing", "s3://lvd/nothing: nothing there"),
        ("source", "s3://lvd/{0..3}.tar", "s3://lvd/0.tar: nothing there"),
        ("source", "s3://", "no bucket named"),
        ("source", "s3://Not A Bucket/x", "Invalid bucket name"),
        ("output", "s3://absent/run", "bucket 'absent' does not exist"),
    ],
)
def test_a_place_on_s3_that_is_not_there_is_one_clear_line(
    project: Callable[..., Project],
    s3: Any,
    capsys: pytest.CaptureFixture[str],
    field: str,
    uri: str,
    said: str,
) -> None:
    work = project(pool=range(2))
    if field == "output":
        work.recipe["output"] = uri
    else:
        work.recipe["sources"]["pool"][0]["uri"] = uri
    line = failed(work, capsys)
    assert said in line
    assert ("sources.pool.0.uri" if field == "source" else uri) in line


def test_a_wrong_endpoint_fails_within_seconds(
    project: Callable[..., Project],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint(monkeypatch, f"http://127.0.0.1:{port}")
    work = project(pool=range(2))
    work.recipe["sources"]["pool"][0]["uri"] = "s3://lvd/pool"
    line = failed(work, capsys)
    assert line.startswith("curate: sources.pool.0.uri: s3://lvd/pool: Could not connect")
    assert "AWS_ENDPOINT_URL" in line
    endpoint(monkeypatch, "no-endpoint")
    assert "AWS_ENDPOINT_URL" in failed(work, capsys)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("SignatureDoesNotMatch", "check AWS_SECRET_ACCESS_KEY"),
        ("InvalidAccessKeyId", "check AWS_ACCESS_KEY_ID"),
        ("AccessDenied", "access denied; check the credentials"),
        ("ExpiredToken", "refresh the credentials"),
    ],
)
@pytest.mark.parametrize("field", ["source", "tar", "output"])
def test_wrong_credentials_are_one_clear_line(
    project: Callable[..., Project],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: str,
    said: str,
    field: str,
) -> None:
    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self.send_response(400 if code == "ExpiredToken" else 403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_PUT = do_POST = do_GET

        def log_message(self, *arguments: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        work = project(pool=range(2))
        uri = {"source": "s3://lvd/pool", "tar": "s3://lvd/a.tar", "output": "s3://lvd/run"}[field]
        if field == "output":
            work.recipe["output"] = uri
        else:
            work.recipe["sources"]["pool"][0]["uri"] = uri
        line = failed(work, capsys)
    finally:
        server.shutdown()
        server.server_close()
    assert said in line
    assert "s3://lvd/" in line
    if field != "output":
        assert "sources.pool.0.uri" in line


def test_no_credentials_at_all_are_one_clear_line(
    project: Callable[..., Project],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    work = project(pool=range(2))
    work.recipe["sources"]["pool"][0]["uri"] = "s3://lvd/pool"
    assert "Unable to locate credentials" in failed(work, capsys)
