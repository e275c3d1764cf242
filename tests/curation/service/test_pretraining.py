"""`metrics.jsonl` as it grows, is cut by a kill, and is gone back in by a resumed run."""

import itertools
import json
import math
from pathlib import Path

import pytest

from curation.runtime.store import FileStore
from curation.service.charts import chart
from curation.service.metrics import _of_pretraining
from curation.service.pretraining import MAX_POINTS, Pretraining


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretraining:
    monkeypatch.setattr("curation.service.pretraining.READ_S", 0.0)
    monkeypatch.setattr("curation.service.pretraining.BLOCK_BYTES", 200)
    write(tmp_path, range(1, 4))
    return Pretraining("x", "x", FileStore(str(tmp_path)))


def write(folder: Path, iterations: range, plus: float = 0.0, end: str = "") -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for n in iterations:
            file.write(json.dumps({"time": 1.0, "iteration": n, "loss": n + plus}) + "\n")
        file.write(end)


def losses(run: Pretraining) -> list[tuple[int, float]]:
    run._state._value = None  # read now
    return run.curves().losses["loss"]


def test_new_lines_are_read_once_they_are_whole(run: Pretraining, tmp_path: Path) -> None:
    assert losses(run) == [(1, 1), (2, 2), (3, 3)]
    write(tmp_path, range(4, 5), end='{"time": 1.0, "iterat')
    assert losses(run) == [(1, 1), (2, 2), (3, 3), (4, 4)]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('ion": 5, "loss": NaN}\n[]\n{"iteration": 6, "loss": 6}\n')
    assert losses(run)[-2:] == [(4, 4), (6, 6)]


def test_a_loss_that_is_not_finite_is_told_until_it_is_again(
    run: Pretraining, tmp_path: Path
) -> None:
    """As `pretrain` writes it; else Prometheus would see the last finite loss for ever."""

    def gauge() -> float:
        run._state._value = None  # read now
        return next(value for name, _, value in _of_pretraining(run) if name == "lvd_pretrain_loss")

    assert gauge() == 3
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1.0, "iteration": 4, "loss": null}\n')
        file.write('{"time": 1.0, "iteration": 4, "knn_accuracy": 0.5}\n')
    assert math.isnan(gauge())
    assert run.curves().not_finite == ["loss"]
    write(tmp_path, range(5, 6))
    assert gauge() == 5


def test_a_resumed_run_replaces_what_it_does_again(run: Pretraining, tmp_path: Path) -> None:
    assert len(losses(run)) == 3
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    write(tmp_path, range(2, 3), plus=0.5)
    assert losses(run) == [(1, 1), (2, 2.5)]
    write(tmp_path, range(2, 8), plus=0.25)  # lines that were appended without the cut
    assert losses(run) == [(1, 1), *((n, n + 0.25) for n in range(2, 8))]


def test_long_runs_are_thinned(run: Pretraining, tmp_path: Path) -> None:
    write(tmp_path, range(4, 5001))
    points = losses(run)
    assert len(points) <= MAX_POINTS
    assert (points[0], points[-1]) == ((1, 1), (5000, 5000))
    steps = [b[0] - a[0] for a, b in itertools.pairwise(points)]
    assert max(steps) <= 20


def test_a_chart_holds_its_line_and_round_ticks() -> None:
    found = chart("Loss", [(0, 11.93), (50, 9.4), (100, 7.21)])
    assert [label for _, label in found.ticks] == ["6", "8", "10", "12"]
    heights = [float(point.split(",")[1]) for point in found.line.split()]
    assert heights == sorted(heights)
    assert 0 <= heights[0] < heights[-1] <= 130
    assert (found.last, found.first_x, found.last_x) == ("7.21", "0", "100")
    flat = chart("Teacher entropy", [(1, 6.9314710), (2, 6.9314718)])
    assert len({label for _, label in flat.ticks}) == len(flat.ticks)
    assert chart("Wait", [(1, 0.02)], percent=True).last == "2 %"
