"""The pipeline and training on a real S3 store, behind a proxy that fails as networks do."""

import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pyarrow.parquet as pq
import pytest
import yaml
from finished import final_files
from s3_server import BUCKET, FAULTS, KEY, SECRET, Faults, proxy, seaweed, use
from workbench import Project

import curation.runtime.s3
import pretrain.cli
import pretrain.storage
from curation.runtime.s3 import S3Store
from curation.runtime.store import StoreError
from pretrain.errors import UserError
from pretrain.storage import S3Storage

RUN = "runs/a"
SOURCES = ("pool", "curated", "holdout")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("s3")]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of the store itself."""
    with seaweed(tmp_path_factory.mktemp("seaweed")) as port:
        yield port


@pytest.fixture
def faults(store: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """None until the test sets their share; clients here reach the store through them."""
    for module in (curation.runtime.s3, pretrain.storage):
        monkeypatch.setattr(module, "READ_TIMEOUT_S", 2)
    made = Faults(0.0)
    with proxy(store, made) as port:
        use(monkeypatch, port)
        yield made


class Bucket:
    """What any other reader of the store sees, past the faults."""

    def __init__(self, port: int) -> None:
        session = boto3.Session(KEY, SECRET, region_name="us-east-1")
        self._client = session.client("s3", endpoint_url=f"http://127.0.0.1:{port}")

    def upload(self, folder: Path, prefix: str) -> None:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            key = f"{prefix}/{path.relative_to(folder).as_posix()}"
            self._client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())

    def versions(self, prefix: str) -> dict[str, str]:
        pages = self._client.get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
        return {x["Key"]: x["ETag"] for page in found for x in page.get("Contents", ())}

    def read(self, key: str) -> bytes:
        return bytes(self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read())

    def delete(self, prefix: str) -> None:
        for key in self.versions(prefix):
            self._client.delete_object(Bucket=BUCKET, Key=key)

    def download(self, prefix: str, folder: Path) -> Path:
        for key in self.versions(prefix):
            path = folder / key.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(key))
        return folder


class Watcher(threading.Thread):
    """Reads every object that appears, as soon as it does, and checks that it is whole."""

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        super().__init__(daemon=True)
        self._bucket, self._prefix = bucket, prefix
        self._ended = threading.Event()
        self.seen: dict[str, str] = {}
        self.broken: list[str] = []

    def run(self) -> None:
        while not self._ended.wait(0.1):
            self._look()
        self._look()

    def _look(self) -> None:
        for key, version in self._bucket.versions(self._prefix).items():
            if self.seen.get(key) == version:
                continue
            try:
                _open(key, self._bucket.read(key))
            except self._bucket._client.exceptions.NoSuchKey:
                continue
            except Exception as error:  # whatever a reader of half a file would meet
                self.broken.append(f"{key}: {error!r}")
            self.seen[key] = version

    def end(self) -> None:
        self._ended.set()
        self.join()


def _open(key: str, data: bytes) -> None:
    """Reads a file to its end by its kind."""
    if key.endswith(".parquet"):
        pq.read_table(io.BytesIO(data))
    elif key.endswith(".tar"):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            assert data.endswith(bytes(1024))
            assert all(tar.extractfile(member) for member in tar.getmembers())
    elif key.endswith((".json", ".jsonl")):
        for line in [data] if key.endswith(".json") else data.splitlines():
            json.loads(line)
    elif key.endswith(".yaml"):
        assert data.endswith(b"\n")
        yaml.safe_load(data)


def on_s3(work: Project, bucket: Bucket) -> dict[str, Any]:
    """The recipe with its sources uploaded, and its output on S3 as well."""
    names = [path.name for path in work.folder.iterdir() if path.name in SOURCES]
    for name in names:
        bucket.upload(work.folder / name, f"sources/{name}")
    text = work.path.read_text().replace(f"{work.folder}/run", f"s3://{BUCKET}/{RUN}")
    for name in names:
        text = text.replace(f"{work.folder}/{name}", f"s3://{BUCKET}/sources/{name}")
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def test_a_run_on_s3_is_the_local_one_whatever_fails(
    project: Callable[..., Project], store: int, faults: Faults, tmp_path: Path
) -> None:
    work, bucket = project(pool=range(32), holdout=range(200, 203)), Bucket(store)
    assert work.run() == 0
    local = final_files(work.run_folder)
    work.recipe = on_s3(work, bucket)
    assert work.run() == 0
    whole = final_files(bucket.download(RUN, tmp_path / "whole"))
    bucket.delete(RUN)
    watcher = Watcher(bucket, RUN)
    watcher.start()
    faults.share = 0.08
    assert work.run() == 0
    faults.share = 0.0
    watcher.end()
    assert all(faults.done[kind] for kind in FAULTS), faults.done
    assert len(watcher.seen) > len(whole)
    assert watcher.broken == []
    assert final_files(bucket.download(RUN, tmp_path / "after")) == whole
    # Tables name their sources, which lie elsewhere: but the data set is the same to the byte.
    shards = {name: data for name, data in local.items() if name.startswith("shards/0")}
    assert len(shards) >= 2
    assert shards == {name: whole.get(name) for name in shards}


TINY = """
model: {patch_size: 8, width: 48, depth: 1, heads: 3, image_size: 32}
objective:
  dino_head: {prototypes: 64, hidden: 64, bottleneck: 32}
  ibot_head: null
crops: {global_size: 32, local_size: 16, local_crops: 2}
schedule: {iterations: 4, batch: 8, warmup: 1, last_layer_freeze: 1}
data: {workers: 0}
parallel: {precision: fp32}
watch: {log_every: 1, checkpoint_every: 0}
"""


def test_training_from_s3_is_training_from_a_folder_whatever_fails(
    project: Callable[..., Project], store: int, faults: Faults, tmp_path: Path
) -> None:
    work = project(pool=range(24))
    assert work.run() == 0
    shards, config = work.run_folder / "shards", tmp_path / "tiny.yaml"
    config.write_text(TINY)
    Bucket(store).upload(shards, "shards")

    def losses(where: str, out: Path) -> list[dict[str, float]]:
        given = ["train", "--config", str(config), "--shards", where, "--out", str(out)]
        assert pretrain.cli.main(given) == 0
        told = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if "loss" in k or "norm" in k} for line in told]

    expected = losses(str(shards), tmp_path / "local")
    assert len(expected) == 4
    assert "loss" in expected[0]
    faults.share = 0.3
    assert losses(f"s3://{BUCKET}/shards", tmp_path / "remote") == expected
    assert all(faults.done[kind] for kind in FAULTS if kind != "cut upload"), faults.done


def test_of_many_writers_one_gets_the_run(faults: Faults) -> None:
    one = S3Store(f"s3://{BUCKET}/race")
    faults.share = 0.1
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda n: one.write_if("lock", b"%d" % n, ""), range(16)))
    assert sum(version is not None for version in won) == 1


def test_a_store_says_what_is_wrong_with_keys_and_buckets(
    faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match=r"^s3://nowhere/x: bucket 'nowhere' does not exist$"):
        S3Store("s3://nowhere").read("x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="the secret key is wrong; check AWS_SECRET_ACCESS_KEY"):
        S3Store(f"s3://{BUCKET}").read("x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(StoreError, match="the access key is not known; check AWS_ACCESS_KEY_ID"):
        S3Store(f"s3://{BUCKET}").read("x")


@pytest.mark.parametrize("kind", [S3Store, S3Storage])
def test_keys_that_are_written_anew_are_used(
    kind: type[S3Store] | type[S3Storage],
    store: int,
    faults: Faults,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As agents do that renew keys in ~/.aws/credentials, while a run goes on."""
    (tmp_path / "x").write_bytes(b"data")
    Bucket(store).upload(tmp_path, "keys")
    keys = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)

    def write(secret: str) -> None:
        keys.write_text(f"[default]\naws_access_key_id={KEY}\naws_secret_access_key={secret}\n")

    write(SECRET)
    one = kind(f"s3://{BUCKET}/keys")
    assert one.read("x") == b"data"
    write("no-longer")
    with pytest.raises((StoreError, UserError), match="the secret key is wrong"):
        one.read("x")
    write(SECRET)
    assert one.read("x") == b"data"
