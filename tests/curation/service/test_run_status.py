"""What the service says of runs that go on, die and fail, while they do."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from served import served, write_metrics
from workbench import Project

from curation.runtime.status import STALLED_S
from curation.runtime.store import FileStore
from curation.service.catalog import Catalog
from curation.service.client import ApiError, Client
from curation.service.events import EventLog
from curation.service.runs import Run
from curation.service.shards import ShardReader

# `curate` with an embed stage that lasts until it is killed.
FOREVER = """
import sys, time
from curation.cli import main
from curation.stages import embed
embed.run = lambda *given: time.sleep(600)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def waiting(project: Callable[..., Project]) -> Iterator[tuple[Project, subprocess.Popen[bytes]]]:
    work = project(pool=range(4))
    command = [sys.executable, "-c", FOREVER, "run", str(work.path), "--ray", "off"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (work.run_folder / "status" / "embed.json").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    yield work, running
    running.kill()
    running.wait()


def run_of(work: Project) -> Run:
    return Catalog(str(work.folder)).run("run")


def rewrite(work: Project, stage: str, **fields: Any) -> None:
    path = work.run_folder / "status" / f"{stage}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_run_that_goes_on_and_one_that_was_killed(
    waiting: tuple[Project, subprocess.Popen[bytes]],
) -> None:
    work, running = waiting
    states = [stage.state for stage in run_of(work).stages()]
    assert states == ["done", "running", *["waiting"] * 6]
    assert run_of(work).summary().state == "running"
    running.kill()
    running.wait()
    rewrite(work, "embed", heartbeat=time.time() - STALLED_S - 1)
    stage = run_of(work).stages()[1]
    assert stage.state == "stalled"
    assert stage.message == f"no sign of life for {STALLED_S + 1:.0f} s; run again"
    assert run_of(work).summary().state == "stalled"


def test_a_stage_goes_stale_while_it_is_watched(
    waiting: tuple[Project, subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock, not by a new reading of the files."""
    work, running = waiting
    run = run_of(work)
    running.kill()
    running.wait()
    assert run.stages()[1].state == "running"
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + STALLED_S + 6)
    assert run.stages()[1].state == "stalled"


def test_a_finished_run_is_read_again_only_when_it_has_told_something(
    project: Callable[..., Project], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = project(pool=range(6))
    assert work.run() == 0
    run = run_of(work)
    assert run.summary().state == "done"
    asked: list[str] = []
    read = run.store.read
    monkeypatch.setattr(run.store, "read", lambda path, *given: asked.append(path) or read(path))
    run._state._value = None  # what was read is old
    assert run.summary().state == "done"
    assert asked == []
    assert run.describe().name == "test"
    asked.clear()
    assert run.describe().name == "test"
    assert asked == []
    (work.run_folder / "recipe.yaml").write_text("name: another\n")
    assert run.describe().name == "another"
    (work.run_folder / "embed" / "done.json").unlink()
    rewrite(work, "embed", state="running", heartbeat=time.time())
    run._state._value = None
    assert run.stages()[1].state == "running"


def test_a_stage_that_failed_says_why(project: Callable[..., Project]) -> None:
    work = project(pool=range(6), holdout=range(6))
    assert work.run() == 1
    run = run_of(work)
    failed = [stage for stage in run.stages() if stage.state == "failed"]
    assert [stage.stage for stage in failed] == ["cluster"]
    assert "no pool image is left after dedup" in failed[0].message
    told = run.describe()
    assert (told.state, told.stage) == ("failed", "cluster")
    assert told.selected is None
    assert [step.name for step in told.funnel] == ["in the pool", "usable", "distinct"]


def test_speed_counts_what_is_new(waiting: tuple[Project, subprocess.Popen[bytes]]) -> None:
    work, running = waiting
    running.kill()
    running.wait()
    now = time.time()
    counts = {"total": 1000, "done": 400, "reused": 300, "started": now - 50, "heartbeat": now}
    rewrite(work, "embed", **counts, faults={"truncated": 2}, failed_parts=1)
    stage = run_of(work).stages()[1]
    assert stage.rate_per_second == pytest.approx(2)
    assert stage.eta_seconds == pytest.approx(300)
    assert stage.failures == {"truncated": 2, "part_failed": 1}


@pytest.mark.slow
def test_shards_show_as_they_are_written(project: Callable[..., Project]) -> None:
    work = project()
    assert work.run() == 0
    with served(work.folder) as service, Client(service.url) as client:
        assert client.shard_page("run").complete
        whole = list(client.shards("run"))
        assert len(whole) > 2
    (work.run_folder / "shards" / "done.json").unlink()
    (work.run_folder / "shards" / "manifest.json").unlink()
    (work.run_folder / "shards" / "000001.index.parquet").unlink()  # its tar is not finished
    with served(work.folder) as service, Client(service.url) as client:
        page = client.shard_page("run")
        assert not page.complete
        assert page.shards == [whole[0], *whole[2:]]
        with pytest.raises(ApiError, match=r"has no shard '000001\.tar'"):
            client.samples("run", "000001.tar")


def test_a_recipe_beside_the_runs_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    assert Catalog(str(tmp_path)).all() == []


def test_a_run_is_shown_while_it_goes_on(
    project: Callable[..., Project], capsys: pytest.CaptureFixture[str]
) -> None:
    work = project(pool=range(3))
    assert work.run("--ray", "off", "--serve", "0") == 0
    assert f"serving {work.run_folder} on http://127.0.0.1:" in capsys.readouterr().out


def test_a_folder_with_a_tilde_hides_no_run(tmp_path: Path) -> None:
    catalog = Catalog(str(tmp_path))
    write_metrics(tmp_path / "a~b")
    assert [(run.name, run.path) for run in catalog.all()] == [("a~b", "a~b")]
    write_metrics(tmp_path / "a" / "b")
    catalog._found._value = None  # what was found is old
    assert {run.name: run.path for run in catalog.all()} == {"a~b": "a/b", "a~b~": "a~b"}


def test_what_is_read_by_readers_waits_for_no_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else pages of as many runs as there are readers would wait for each other for ever."""
    (tmp_path / "shards").mkdir()
    facts = {"images": "3", "bytes": "10", "sha256": "0" * 64}
    for number in range(3):
        index = pa.schema([("key", pa.string())], metadata=facts).empty_table()
        pq.write_table(index, tmp_path / "shards" / f"{number:06d}.index.parquet")
    run, threads = Run("x", "x", FileStore(str(tmp_path))), set()
    state = run._state.get

    def noted() -> Any:
        threads.add(threading.current_thread())
        return state()

    monkeypatch.setattr(run._state, "get", noted)
    assert [shard.images for shard in ShardReader().page(run, 0, 10).shards] == [3, 3, 3]
    assert threads == {threading.current_thread()}


def test_a_line_that_a_kill_cut_short_holds_up_no_later_events(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    folder.mkdir()
    (folder / "20260101T000000-1-0000.jsonl").write_text('{"n": 1}\n{"n"')
    log = EventLog(FileStore(str(tmp_path)))
    events, place = log.read("")
    assert events == [{"n": 1}]
    assert log.read(place) == ([], place)
    (folder / "20260102T000000-1-0000.jsonl").write_text('{"n": 2}\n')
    log._segments._value = None  # what was listed is old
    events, place = log.read(place)
    assert events == [{"n": 2}]
    assert log.read(place) == ([], place)
