"""What the service answers is what lies in the store: held against the files by other readers."""

import hashlib
import io
import itertools
import json
import tarfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from served import Served

from curation.service.client import ApiError, Client
from curation.service.metrics import GAUGES


@pytest.fixture(scope="module")
def rows(runs: Path) -> list[dict[str, Any]]:
    """The lineage as its files have it."""
    parts = sorted((runs / "birds" / "lineage" / "parts").glob("*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def one(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return next(row for row in rows if row["key"] == key)


def test_both_kinds_of_runs_are_found(client: Client) -> None:
    found = {run.run: run for run in client.runs()}
    assert set(found) == {"birds", "vit"}
    assert (found["birds"].kind, found["birds"].state) == ("curation", "done")
    assert (found["vit"].kind, found["vit"].share) == ("pretraining", 30 / 40)


def test_counts_are_those_of_the_store(
    client: Client, rows: list[dict[str, Any]], runs: Path
) -> None:
    run = client.run("birds")
    by_decision = {d: sum(r["decision"] == d for r in rows) for d in {r["decision"] for r in rows}}
    assert run.decisions is not None
    assert {d: n for d, n in run.decisions.items() if n} == by_decision
    assert run.images == len(rows)
    assert run.selected == sum(row["shard"] is not None for row in rows)
    steps = {step.name: step.images for step in run.funnel}
    pool = [row for row in rows if row["source"] == "pool"]
    assert steps["in the pool"] == len(pool)
    assert steps["usable"] == sum(row["decision"] != "rejected" for row in pool)
    assert steps["retrieved"] == sum(row["decision"] == "selected" for row in pool)
    assert steps["written"] == run.selected
    assert run.shards == len(list((runs / "birds" / "shards").glob("*.tar")))
    assert sum(row.final for row in run.composition) == run.selected
    embed = client.stage("birds", "embed")
    assert (embed.state, embed.done, embed.failures) == (
        "done",
        len(rows),
        {"too_small": 1, "empty_file": 1},
    )


def test_shards_and_their_images(client: Client, runs: Path, tmp_path: Path) -> None:
    shards = list(client.shards("birds"))
    files = sorted((runs / "birds" / "shards").glob("*.tar"))
    assert [shard.shard for shard in shards] == [file.name for file in files]
    for shard, file in zip(shards, files, strict=True):
        assert hashlib.sha256(file.read_bytes()).hexdigest() == shard.sha256
        page = client.samples("birds", shard.shard)
        with tarfile.open(file) as tar:
            names = [name for name in tar.getnames() if not name.endswith(".json")]
            assert [sample.member for sample in page.samples] == names
            assert page.total == shard.images == len(names)
            first = tar.extractfile(names[0])
            assert first is not None
            assert client.image("birds", shard.shard, page.samples[0].key) == first.read()
    small = Image.open(io.BytesIO(client.image("birds", files[0].name, names_key(files[0]), 64)))
    assert max(small.size) <= 176
    second = client.shard_page("birds", offset=1, limit=1)
    assert [shard.shard for shard in second.shards] == [files[1].name]
    assert client.download("birds", files[0].name, tmp_path / "x.tar") == files[0].stat().st_size
    assert (tmp_path / "x.tar").read_bytes() == files[0].read_bytes()


def names_key(tar: Path) -> str:
    with tarfile.open(tar) as file:
        return file.getnames()[0].partition(".")[0]


def test_a_download_goes_on_where_it_broke_off(http: httpx.Client, runs: Path) -> None:
    whole = (runs / "birds" / "shards" / "000000.tar").read_bytes()
    answer = http.get(
        "/api/runs/birds/shards/000000.tar/download", headers={"Range": "bytes=1000-1999"}
    )
    assert answer.status_code == 206
    assert answer.content == whole[1000:2000]


@pytest.mark.parametrize(
    ("key", "decision"),
    [("larger-copy.jpg", None), ("00003.jpg", "duplicate"), ("tiny.png", "rejected")],
)
def test_the_story_of_an_image(
    client: Client, rows: list[dict[str, Any]], key: str, decision: str | None
) -> None:
    row = one(rows, key)
    assert decision in (None, row["decision"])
    story = client.story("birds", row["id"])
    assert story.images[0].model_dump() == row
    group = [r["image"] for r in rows if r["component"] == row["component"] is not None]
    assert sorted(image.image for image in story.duplicates) == group
    assert client.story("birds", row["id"][:12]).images == story.images


def test_a_duplicate_names_the_one_that_stays_first(
    client: Client, rows: list[dict[str, Any]]
) -> None:
    story = client.story("birds", one(rows, "00003.jpg")["id"])
    assert story.duplicates[0].key == "larger-copy.jpg"
    assert story.duplicates[0].id in story.images[0].reason


def test_a_near_perceptual_hash_names_the_better_image(
    client: Client, http: httpx.Client, rows: list[dict[str, Any]]
) -> None:
    better, image = one(rows, "larger-copy.jpg")["id"], one(rows, "00003.jpg")
    (told,) = client.story("birds", image["id"]).images
    assert told.phash_duplicate_of == better
    assert told.phash_bits == image["phash_bits"] <= 4
    page = http.get(f"/runs/birds/images/{image['id']}").text
    assert (
        f'{told.phash_bits} of 64 bits from that of <a href="/runs/birds/images/{better}">' in page
    )


def test_images_of_the_same_bytes_have_one_story(
    client: Client, rows: list[dict[str, Any]]
) -> None:
    story = client.story("birds", one(rows, "same-bytes.jpg")["id"])
    assert {image.key for image in story.images} == {"same-bytes.jpg", "00005.jpg"}


def test_what_a_query_brought(client: Client, rows: list[dict[str, Any]]) -> None:
    for query in (row for row in rows if row["source"] == "curated"):
        brought = client.story("birds", query["id"]).brought
        expected = {
            row["image"]: by["cosine"]
            for row in rows
            for by in row["retrieved_by"]
            if by["query_id"] == query["id"]
        }
        assert {image.image for image in brought} == set(expected)
        cosines = [expected[image.image] for image in brought]
        assert cosines == sorted(cosines, reverse=True)
        assert expected


def test_every_image_is_found_by_its_id_and_key(client: Client, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["image"] in {i.image for i in client.story("birds", row["id"]).images}
        assert row["image"] in {i.image for i in client.by_key("birds", row["key"]).images}
    assert client.by_key("birds", "nothing").images == []


def test_images_that_were_not_selected_have_a_picture_too(
    http: httpx.Client, rows: list[dict[str, Any]]
) -> None:
    for key, code in (("00003.jpg", 200), ("tiny.png", 200), ("empty.jpg", 404)):
        answer = http.get(f"/api/runs/birds/images/{one(rows, key)['id']}/thumbnail")
        assert answer.status_code == code
        if code == 200:
            assert Image.open(io.BytesIO(answer.content)).format == "WEBP"


def test_search_finds_what_brute_force_finds(
    client: Client, rows: list[dict[str, Any]], runs: Path, project_root: Path
) -> None:
    parts = pq.read_table(runs / "birds" / "ingest" / "parts.parquet").to_pylist()
    done = json.loads((runs / "birds" / "embed" / "done.json").read_text())
    from curation.runtime.manifest import embedded_name

    vectors, numbers = [], []
    for part in parts:
        name = embedded_name(part["fingerprint"], done["counts"]["embedding"])
        table = pq.read_table(runs / "birds" / "embed" / "vectors" / f"{name}.parquet")
        vectors += [np.frombuffer(v.as_py(), np.float16) for v in table["semantic"]]
        numbers += [part["base"] + row for row in table["row"].to_pylist()]
    matrix = np.stack(vectors).astype(np.float32)
    mine = one(rows, "00012.jpg")
    cosines = matrix @ matrix[numbers.index(mine["image"])]
    expected = [numbers[at] for at in np.argsort(-cosines)[:5]]
    near = client.nearest("birds", mine["id"], k=4)
    assert [hit.image.image for hit in near.hits] == expected[1:]
    found = client.search("birds", (project_root / "pool" / "00012.jpg").read_bytes(), k=5)
    assert (found.complete, found.searched) == (True, len(matrix))
    assert found.hits[0].image.key == "00012.jpg"
    assert found.hits[0].cosine == pytest.approx(1, abs=2e-3)
    assert {hit.image.image for hit in found.hits} == set(expected)


def test_what_was_rejected_has_no_neighbours(client: Client, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(ApiError, match="404: this image was rejected, so it has no vector"):
        client.nearest("birds", one(rows, "tiny.png")["id"])


def test_a_search_with_what_is_no_image(client: Client) -> None:
    with pytest.raises(ApiError, match=r"422: the upload can't be used: not_an_image") as error:
        client.search("birds", b"<html>")
    assert error.value.status == 422


def test_curves_of_pretraining(client: Client) -> None:
    curves = client.pretraining("vit")
    assert (curves.iteration, curves.iterations) == (30, 40)
    assert curves.losses["loss"][0] == (1, 11.9)
    assert len(curves.losses["loss"]) == 30
    assert curves.series["knn_accuracy"] == [(10, 0.1), (20, 0.2), (30, 0.3)]


def test_events_are_followed_and_gone_on_with(http: httpx.Client, runs: Path) -> None:
    files = sorted((runs / "birds" / "events").glob("*.jsonl"))
    told = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    seen, place = [], f"{files[0].name}:0"
    with http.stream("GET", "/api/runs/birds/events", headers={"Last-Event-ID": place}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        kind = ""
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            kind = value if name == "event" else kind
            place = value if name == "id" else place
            if name == "data" and kind == "event":
                seen.append(json.loads(value))
            if len(seen) == len(told):
                break
    assert seen == told
    assert place.startswith(files[-1].name)


def test_the_client_follows_events(client: Client) -> None:
    kinds = [kind for kind, _ in itertools.islice(client.events("birds"), 3)]
    assert kinds == ["stages", "event", "event"]


def test_metrics_are_those_that_dashboards_name(
    http: httpx.Client, rows: list[dict[str, Any]]
) -> None:
    http.get("/api/runs")
    text = http.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(GAUGES) <= set(families)
    assert {"lvd_http_requests", "lvd_http_request_seconds"} <= set(families)

    def value(name: str, **labels: str) -> float:
        family = families[name]
        return next(s.value for s in family.samples if s.labels == labels)

    selected = sum(row["decision"] == "selected" for row in rows)
    assert value("lvd_run_images", run="birds", decision="selected") == selected
    assert value("lvd_stage_state", run="birds", stage="embed", state="done") == 1
    assert value("lvd_stage_state", run="birds", stage="embed", state="running") == 0
    assert value("lvd_stage_failures", run="birds", stage="embed", reason="too_small") == 1
    assert value("lvd_pretrain_loss", run="vit", loss="loss") == pytest.approx(9)
    assert value("lvd_pretrain_knn_accuracy", run="vit") == pytest.approx(0.3)
    seen = {s.labels["route"] for s in families["lvd_http_requests"].samples}
    assert "/api/runs" in seen
    assert not any("birds" in route for route in seen)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/api/runs/nope", "no run 'nope'; /api/runs lists them"),
        ("/api/runs/vit", "'vit' is a run of pretraining; it has no stages and shards"),
        ("/api/runs/birds/pretraining", "'birds' is a run of curation; it has no losses"),
        ("/api/runs/birds/stages/nope", "no stage 'nope'; a run's stages are in /api/runs/birds"),
        ("/api/runs/birds/shards/000099.tar", "run 'birds' has no shard '000099.tar'"),
        ("/api/runs/birds/images/xyz", "an id is 8 to 64 hexadecimal digits"),
        ("/api/runs/birds/images/00000000", "run 'birds' has no image with the id '00000000'"),
        ("/api/jobs/lvd-0123456789abcdef", "no Ray cluster is known here"),
    ],
)
def test_what_is_not_there(http: httpx.Client, path: str, text: str) -> None:
    answer = http.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"].startswith(text)


def test_no_answer_waits_for_an_acknowledgement(http: httpx.Client) -> None:
    """With Nagle's algorithm each takes 40 ms on a connection that is no longer new."""
    took = []
    for _ in range(40):
        began = time.monotonic()
        http.get("/healthz")
        took.append(time.monotonic() - began)
    assert min(took[20:]) < 0.03


def test_probes(http: httpx.Client) -> None:
    assert http.get("/healthz").json() == http.get("/readyz").json() == {"status": "ok"}


def test_every_call_of_the_api_has_an_example_or_a_description(service: Served) -> None:
    paths = httpx.get(f"{service.url}/openapi.json").json()["paths"]
    assert len(paths) == 21
    for path, calls in paths.items():
        for call in calls.values():
            assert call["description"], path
