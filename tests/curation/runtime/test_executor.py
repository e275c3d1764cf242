"""Work over parts in this process: what is passed over, what fails alone, what stops all."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from curation.images.errors import EncoderError
from curation.runtime.events import Events, Progress
from curation.runtime.executor import (
    InProcessExecutor,
    Item,
    Work,
    describe,
    map_parts,
    require_all,
)
from curation.runtime.store import FileStore, StoreError


class Halve:
    """Even numbers only."""

    made = 0

    def __init__(self) -> None:
        Halve.made += 1

    def __call__(self, item: int) -> dict[str, Any]:
        if item == 8:
            raise StoreError("/pool: no such file")
        if item % 2:
            raise ValueError("odd\n  number")
        return {"faults": {"corrupt": item}}


def work(numbers: range, **given: Any) -> Work:
    items = [Item(f"part-{n}", 10, n) for n in numbers]
    return Work("embed", items, lambda item: item.payload < 2, Halve, **given)


@pytest.fixture
def events(tmp_path: Path) -> Events:
    return Events(FileStore(str(tmp_path)))


def test_finished_parts_are_passed_over_and_failed_ones_are_named(events: Events) -> None:
    Halve.made = 0
    result = map_parts(work(range(10)), InProcessExecutor(), events)
    assert (result.computed, result.reused, Halve.made) == (3, 2, 1)
    assert result.failed == {
        "part-3": "ValueError: odd number",
        "part-5": "ValueError: odd number",
        "part-7": "ValueError: odd number",
        "part-8": "/pool: no such file",
        "part-9": "ValueError: odd number",
    }
    with pytest.raises(StoreError, match=r"embed: 5 of 8 parts failed \(part-3: ValueError: odd"):
        require_all(result, "embed")


def test_no_worker_is_made_for_nothing(events: Events) -> None:
    Halve.made = 0
    result = map_parts(work(range(2)), InProcessExecutor(), events)
    assert (result.computed, result.reused, Halve.made) == (0, 2, 0)
    require_all(result, "embed")


def test_a_check_stops_the_work(events: Events) -> None:
    seen = []

    def check(progress: Progress) -> None:
        seen.append(dict(progress.faults))
        if progress.faults["corrupt"] > 4:
            raise StoreError("too many")

    with pytest.raises(StoreError, match="too many"):
        map_parts(work(range(2, 12), check=check), InProcessExecutor(), events)
    assert seen == [{"corrupt": 2}, {"corrupt": 6}]


def test_a_model_that_cannot_be_used_stops_the_work(events: Events) -> None:
    def fail(item: int) -> dict[str, Any]:
        raise EncoderError(f"encoder.decoder: no GPU for part {item}")

    given = replace(work(range(2, 9)), make_worker=lambda: fail)
    with pytest.raises(StoreError, match=r"^EncoderError: encoder.decoder: no GPU for part 2$"):
        map_parts(given, InProcessExecutor(), events)


def test_the_status_counts_images(tmp_path: Path, events: Events) -> None:
    with events.stage("embed"):
        map_parts(work(range(6)), InProcessExecutor(), events)
    status = json.loads((tmp_path / "status" / "embed.json").read_text())
    expected = {"state": "done", "total": 60, "done": 60, "reused": 20, "failed_parts": 2}
    assert status | expected == status
    assert status["faults"] == {"corrupt": 6}


def test_errors_as_one_line() -> None:
    assert describe(StoreError("/a: no such file")) == "/a: no such file"
    assert describe(KeyError("x")) == "KeyError: 'x'"
    assert len(describe(ValueError("x" * 10_000))) < 600
