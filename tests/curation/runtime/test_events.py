"""Events and statuses as files: complete lines, the last word of a stage, a heartbeat."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from curation.runtime import events as module
from curation.runtime.events import Events, Progress
from curation.runtime.store import FileStore, StoreError


def lines(root: Path) -> list[dict[str, Any]]:
    files = sorted((root / "events").glob("*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def status(root: Path, stage: str = "embed") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "status" / f"{stage}.json").read_text())
    return found


def test_a_stage_from_its_start_to_its_end(tmp_path: Path) -> None:
    shown: list[dict[str, Any]] = []
    events = Events(FileStore(str(tmp_path)), shown.append)
    with events.stage("embed"):
        assert status(tmp_path)["state"] == "running"
        progress = Progress(events, "embed", 30, workers=2)
        progress.skip(10)
        progress.add("a", 10, {"corrupt": 3})
        progress.fail("b", 10, "no such file")
        progress.close()
    last = status(tmp_path)
    assert [last[name] for name in ("state", "done", "reused", "failed_parts", "workers")] == [
        "done",
        30,
        10,
        1,
        2,
    ]
    assert last["faults"] == {"corrupt": 3}
    assert [line["event"] for line in lines(tmp_path)] == ["started", "part", "part_failed", "done"]
    assert [one["done"] for one in shown] == [0, 10, 20, 30, 30]
    assert [one["state"] for one in shown] == ["running"] * 4 + ["ended"]


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [(StoreError("no\nspace"), "failed", "no space"), (KeyboardInterrupt(), "stopped", "")],
)
def test_an_error_is_the_last_word(
    tmp_path: Path, error: BaseException, state: str, message: str
) -> None:
    events = Events(FileStore(str(tmp_path)))
    with pytest.raises(type(error)), events.stage("embed"):
        raise error
    assert (status(tmp_path)["state"], status(tmp_path)["message"]) == (state, message)
    assert lines(tmp_path)[-1]["event"] == state


def test_a_store_that_does_not_answer_costs_heartbeats_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.02)
    events, write, failed = Events(FileStore(str(tmp_path))), FileStore.write, 0

    def unreliable(self: FileStore, path: str, data: bytes) -> None:
        nonlocal failed
        if failed < 3:
            failed += 1
            raise StoreError("no answer")
        write(self, path, data)

    with events.stage("embed"):
        first = status(tmp_path)["heartbeat"]
        monkeypatch.setattr(FileStore, "write", unreliable)
        end = time.monotonic() + 20
        while status(tmp_path)["heartbeat"] == first:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert failed == 3
    assert status(tmp_path)["state"] == "done"


def test_segments_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROTATE_BYTES", 200)
    events = Events(FileStore(str(tmp_path)))
    for number in range(10):
        events.emit("embed", "part", part=str(number))
        events.flush()
    assert len(list((tmp_path / "events").glob("*.jsonl"))) > 2
    assert [line["part"] for line in lines(tmp_path)] == [str(n) for n in range(10)]
