"""Runs in a bucket, over the S3 protocol: the same answers, links that expire, and no secrets."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import boto3
import httpx
import pytest
from moto.server import ThreadedMotoServer
from served import Served, served
from workbench import Project

from curation.runtime.store import open_store
from curation.service.client import Client
from curation.service.shards import LINK_S

pytestmark = pytest.mark.slow

SECRET = "secret-of-this-test-0123456789"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="curated")
    yield "s3://curated/all/runs"
    server.stop()


@pytest.fixture
def service(bucket: str, project: Callable[..., Project]) -> Iterator[Served]:
    work = project(pool=range(20))
    work.recipe["output"] = f"{bucket}/birds"
    assert work.run() == 0
    public = os.environ["AWS_ENDPOINT_URL"].replace("127.0.0.1", "localhost")
    with served(bucket, LVD_S3_PUBLIC_URL=public) as found:
        yield found


def test_a_run_in_a_bucket(service: Served, bucket: str, tmp_path: Path) -> None:
    store = open_store(f"{bucket}/birds")
    assert open_store(bucket).folders() == ["birds"]
    assert {"shards", "lineage", "status"} <= set(store.folders())
    manifest = json.loads(store.read("shards/manifest.json"))
    with Client(service.url) as client:
        run = client.run("birds")
        assert (run.state, run.selected) == ("done", manifest["images"])
        names = [shard.shard for shard in client.shards("birds")]
        assert names == [shard["name"] for shard in manifest["shards"]]
        first = client.samples("birds", names[0]).samples[0]
        assert len(client.image("birds", names[0], first.key)) == first.bytes
        assert client.image("birds", names[0], first.key, thumbnail=64)[8:12] == b"WEBP"
        assert client.story("birds", first.key).images[0].shard == names[0]
        assert client.search("birds", client.image("birds", names[0], first.key)).complete
        size = client.download("birds", names[0], tmp_path / "shard.tar")
        assert size == manifest["shards"][0]["bytes"]
    _links_expire(service, names[0])
    _nothing_holds_the_secret(service, bucket)


def _links_expire(service: Served, shard: str) -> None:
    answer = httpx.get(f"{service.url}/api/runs/birds/shards/{shard}/download")
    assert answer.status_code == 307
    link = urlsplit(answer.headers["location"])
    given = parse_qs(link.query)
    if "Expires" in given:  # the older signature names the moment
        life = int(given["Expires"][0]) - time.time()
    else:
        life = int(given["X-Amz-Expires"][0])
    assert 0 < life <= LINK_S
    assert link.path.endswith(f"/curated/all/runs/birds/shards/{shard}")
    assert link.hostname == "localhost"  # not as the service itself reaches the store
    assert SECRET not in answer.headers["location"]


def _nothing_holds_the_secret(service: Served, bucket: str) -> None:
    store = open_store(bucket)
    for entry in store.list():
        if entry.path.endswith((".json", ".jsonl", ".yaml", ".html")):
            assert SECRET.encode() not in store.read(entry.path), entry.path
    assert SECRET not in service.log.read_text()
    assert SECRET not in httpx.get(service.url + "/metrics").text
