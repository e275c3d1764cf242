"""`curate status` tells the truth about runs that go on, die, fail and end; one writer a run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from finished import final_files
from held import held_run
from workbench import Project, write_pictures

from curation.cli import main
from curation.runtime.events import Events
from curation.runtime.status import stage_status
from curation.runtime.store import FileStore


@pytest.fixture
def waiting(project: Callable[..., Project]) -> Iterator[tuple[Project, subprocess.Popen[str]]]:
    """A run that is in its embed stage."""
    work = project(pool=range(10))
    running = held_run(work.path, work.folder / "go")
    end = time.monotonic() + 120
    while not (work.run_folder / "status" / "embed.json").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    yield work, running
    running.kill()
    running.communicate()


def state(work: Project, stage: str) -> str:
    return str(stage_status(FileStore(str(work.run_folder)), stage)["state"])


def age(work: Project, stage: str, seconds: float) -> None:
    """Makes the last heartbeat older."""
    path = work.run_folder / "status" / f"{stage}.json"
    status = json.loads(path.read_text())
    path.write_text(json.dumps({**status, "heartbeat": status["heartbeat"] - seconds}))


def test_a_killed_stage_is_stalled_and_a_new_run_makes_it_done(
    waiting: tuple[Project, subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    work, running = waiting
    assert [state(work, stage) for stage in ("ingest", "embed", "dedup")] == [
        "done",
        "running",
        "waiting",
    ]
    running.kill()
    running.wait()
    assert state(work, "embed") == "running"  # nobody can know yet
    age(work, "embed", 61)
    assert main(["status", str(work.run_folder)]) == 0
    shown = capsys.readouterr().out
    assert "stalled" in shown
    assert "no sign of life" in shown
    assert work.run() == 0
    assert {state(work, stage) for stage in ("ingest", "embed", "report")} == {"done"}


def test_two_runs_at_once(waiting: tuple[Project, subprocess.Popen[str]]) -> None:
    """The second gets one clear error, whatever command it is, and does no harm."""
    work, running = waiting
    second = subprocess.run(
        [sys.executable, "-m", "curation", "run", str(work.path)], capture_output=True, text=True
    )
    assert second.returncode == 1
    assert second.stderr == (
        f"curate: {work.run_folder}: another process is writing this run; wait for it\n"
    )
    assert main(["retry", str(work.run_folder)]) == 1
    (work.folder / "go").touch()
    assert running.wait(120) == 0
    whole = final_files(work.run_folder)
    assert work.run() == 0
    assert final_files(work.run_folder) == whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_a_signal(
    waiting: tuple[Project, subprocess.Popen[str]], number: signal.Signals, code: int
) -> None:
    work, running = waiting
    os.kill(running.pid, number)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == code
    if number == signal.SIGINT:
        assert errors.splitlines()[-1].startswith("curate: stopped; finished parts are kept")
        assert "Traceback" not in errors
        assert state(work, "embed") == "stopped"


def test_a_failed_stage_says_why_until_it_is_done(
    project: Callable[..., Project], capsys: pytest.CaptureFixture[str]
) -> None:
    work = project(pool=range(6), holdout=range(6))
    assert work.run() == 1
    assert [state(work, stage) for stage in ("dedup", "cluster", "retrieve")] == [
        "done",
        "failed",
        "waiting",
    ]
    capsys.readouterr()
    assert main(["status", str(work.run_folder)]) == 0
    assert "no pool image is left after dedup" in capsys.readouterr().out
    write_pictures(work.folder / "pool", [50])
    assert work.run() == 0
    assert state(work, "cluster") == "done"


def test_a_stage_of_an_older_recipe_is_not_done(project: Callable[..., Project]) -> None:
    work = project(pool=range(10))
    assert work.run() == 0
    work.recipe["dedup"] = {"min_cosine": 0.9}
    assert work.run("--ray", "off", "--until", "embed") == 0
    assert [state(work, stage) for stage in ("embed", "dedup", "report")] == [
        "done",
        "waiting",
        "waiting",
    ]


def test_a_long_step_has_a_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curation.runtime.events.HEARTBEAT_S", 0.05)
    events = Events(FileStore(str(tmp_path)))
    path = tmp_path / "status" / "cluster.json"
    with events.stage("cluster"):
        first = json.loads(path.read_text())["heartbeat"]
        end = time.monotonic() + 20
        while json.loads(path.read_text())["heartbeat"] == first:
            assert time.monotonic() < end
            time.sleep(0.02)
