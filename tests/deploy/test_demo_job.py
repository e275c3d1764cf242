"""The demo job of docker-compose.yml, with the store that stands there, but in this process."""

from pathlib import Path

import pytest
import yaml
from judges import ROOT
from s3_server import BUCKET, seaweed, use

from curation.cli import main
from curation.runtime.store import open_store
from demo import images
from demo.upload import main as upload

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("s3")]


def test_the_demo_job_curates_real_images_on_s3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    script = services["demo"]["command"][-1]
    assert f"demo.upload s3://{BUCKET}/demo " in script
    assert script.endswith("curate run /lvd/deploy/demo.yaml")
    assert f"-bucket={BUCKET} " in services["s3"]["command"]
    monkeypatch.setattr(images, "OTHERS", ("coins",))  # fewer than there: it is about the way
    with seaweed(tmp_path) as port:
        use(monkeypatch, port)
        assert upload([f"s3://{BUCKET}/demo"]) == 0
        assert main(["run", str(ROOT / "deploy" / "demo.yaml"), "--ray", "off"]) == 0
        runs = services["service"]["command"].split()[2]
        names = {entry.path for entry in open_store(runs).list()}
    assert {"demo/shards/000000.tar", "demo/report/report.html"} <= names


def test_a_place_that_is_none_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert upload(["/tmp/x"]) == 2
    assert "python -m demo.upload s3://bucket/prefix" in capsys.readouterr().err
