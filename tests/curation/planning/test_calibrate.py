"""The constants that are fitted to two searches whose times are known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation.planning import calibrate, constants, small_runs
from curation.planning.composition import Sizes
from curation.planning.job import Job
from curation.planning.search import Ask, search
from curation.recipe import load

PRESET = Path(__file__).resolve().parents[3] / "recipes" / "lvd142m.yaml"
NPROBE = dict(zip(calibrate.SEARCHED, (6, 9), strict=True))
FOUND = {"cells_gflops": 80.0, "search_gflops": 45.0}  # not as shipped


def planned(rows: int, overhead: float, start: float) -> float:
    """Seconds of a search by the plan."""
    recipe = load(PRESET, ["search.exact_below=0"])
    known = {**FOUND, "search_overhead": overhead, "search_start_s": start}
    sizes = Sizes(rows, dict.fromkeys(recipe.sources.curated, 0), {})
    job = Job.of(recipe, sizes, constants.shipped().updated(known))
    ask = Ask("copies", rows, rows, calibrate.DIM, NPROBE[rows], itself=True)
    return sum(step.seconds for step in search(job, ask))


def fitted(monkeypatch: pytest.MonkeyPatch, took: dict[int, float]) -> dict[str, float]:
    """The constants when searches of so many rows take these seconds."""

    def self_join(rows: Any) -> tuple[float, dict[str, Any]]:
        size = len(rows)
        return took.get(size, 0.0), {"nprobe": NPROBE.get(size, 1)}

    monkeypatch.setattr(calibrate, "_made_up", lambda count: np.zeros((count, 1), np.float32))
    monkeypatch.setattr(small_runs, "self_join", self_join)
    return calibrate._search(load(PRESET, []), dict(FOUND))


@pytest.mark.parametrize(("overhead", "start"), [(1.3, 0.8), (0.7, 0.0), (2.5, 12.0)])
def test_two_searches_give_back_what_they_were_made_with(
    monkeypatch: pytest.MonkeyPatch, overhead: float, start: float
) -> None:
    found = fitted(monkeypatch, {rows: planned(rows, overhead, start) for rows in NPROBE})
    assert found["search_overhead"] == pytest.approx(overhead)
    assert found["search_start_s"] == pytest.approx(start, abs=1e-6)


@pytest.mark.parametrize("noise", [(90.0, 0.0), (-0.5, 0.0)])
def test_noise_makes_no_search_free(
    monkeypatch: pytest.MonkeyPatch, noise: tuple[float, float]
) -> None:
    """Neither a small one that took longer than the large, nor one that began before it began."""
    exact = {rows: planned(rows, 1.3, 0.1) for rows in NPROBE}
    took = {rows: exact[rows] + more for rows, more in zip(NPROBE, noise, strict=True)}
    found = fitted(monkeypatch, took)
    assert found["search_start_s"] == 0
    large = calibrate.SEARCHED[-1]
    assert planned(large, found["search_overhead"], 0.0) == pytest.approx(took[large])


def test_searches_that_take_no_time_leave_what_was_shipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert fitted(monkeypatch, dict.fromkeys(NPROBE, 0.0)) == {}
