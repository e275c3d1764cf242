"""Runs that are damaged, or named oddly, beside one that is not."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from served import Served, served, write_metrics

ODD = "my run #1 100%?x=<b>&'ä"
DAMAGE = {  # a run: the file that is overwritten, and what is asked about it
    "marker": ("embed/done.json", ""),
    "status": ("status/embed.json", ""),
    "recipe": ("recipe.yaml", ""),
    "facts": ("report/report.json", ""),
    "manifest": ("shards/manifest.json", "/shards"),
    "index": ("shards/000000.index.parquet", "/shards/000000.tar"),
    "lineage": ("lineage/parts/000000.parquet", "/images?key=nothing"),
    "lookup": ("lineage/by_id/000000.parquet", "/images/00000000"),
}


@pytest.fixture(scope="module")
def damaged(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("damaged")
    for name, (file, _) in DAMAGE.items():
        shutil.copytree(runs / "birds", root / name)
        assert (root / name / file).exists()
        (root / name / file).write_text("[")
    shutil.copytree(runs / "birds", root / "older")
    marker = root / "older" / "dedup" / "done.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"counts": {}}))
    shutil.copytree(runs / "birds", root / ODD)
    write_metrics(root / "vit")
    with (root / "vit" / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1040.0, "iteration": 31, "loss": 1e999, "koleo": 0.5}\n')
        file.write('{"time": 1041.0, "iteration": 1e999, "loss": 1}\n[1]\n')
        file.write(f'{{"time": 1042.0, "iteration": 32, "loss": 1{"0" * 400}}}\n')
    write_metrics(root / "config")
    (root / "config" / "config.yaml").write_text("schedule: {iterations: many}\n")
    with served(root) as found:
        yield found


def test_a_damaged_run_hides_no_other(damaged: Served) -> None:
    answer = httpx.get(f"{damaged.url}/api/runs")
    found = {run["run"]: run for run in answer.json()["runs"]}
    assert set(found) == {*DAMAGE, "older", ODD, "vit", "config"}
    unreadable = {name for name, run in found.items() if run["state"] == "unreadable"}
    assert unreadable == {"marker", "status", "older", "config"}
    assert "status/embed.json: damaged" in found["status"]["message"]
    assert (found[ODD]["state"], found["vit"]["share"]) == ("done", 31 / 40)
    assert found["status"]["message"].split(" (")[0] in httpx.get(damaged.url).text
    gauges = httpx.get(f"{damaged.url}/metrics")
    assert gauges.status_code == 200
    assert 'run="index"' in gauges.text


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_by_the_name_of_the_file(damaged: Served, name: str) -> None:
    file, call = DAMAGE[name]
    answer = httpx.get(f"{damaged.url}/api/runs/{name}{call}")
    assert answer.status_code == 503
    assert f"{name}/{file}: " in answer.json()["error"]


def test_damage_is_nothing_for_the_log(damaged: Served) -> None:
    assert "Traceback" not in damaged.log.read_text()


def test_curves_leave_out_what_is_no_number(damaged: Served) -> None:
    curves = httpx.get(f"{damaged.url}/api/runs/vit/pretraining").json()
    assert (curves["iteration"], len(curves["losses"]["loss"])) == (31, 30)
    assert curves["losses"]["koleo"][-1] == [31, 0.5]
    assert httpx.get(f"{damaged.url}/runs/vit").status_code == 200


def test_a_damaged_configuration_is_told_too(damaged: Served) -> None:
    for path in ("/api/runs/config/pretraining", "/runs/config"):
        answer = httpx.get(damaged.url + path)
        assert answer.status_code == 503
        assert "config/config.yaml: damaged" in answer.text


def test_links_lead_to_a_run_of_any_name(damaged: Served) -> None:
    links = [f'href="/runs/{quote(ODD)}"', f'href="/runs/{quote(ODD)}/shards/000000.tar"']
    with httpx.Client(base_url=damaged.url) as http:
        assert links[0] in http.get("/").text
        assert links[1] in http.get(f"/runs/{quote(ODD)}").text
        page = http.get(f"/runs/{quote(ODD)}/shards/000000.tar").text
        picture = page.partition('<img src="')[2].partition('"')[0]
        assert http.get(picture).headers["content-type"] == "image/webp"
        id = page.partition(f"/runs/{quote(ODD)}/images/")[2].partition('"')[0]
        found = http.get(f"/runs/{quote(ODD)}/find", params={"q": id})
        assert found.headers["location"] == f"/runs/{quote(ODD)}/images/{id}"
