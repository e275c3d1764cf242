"""Ranking on a grid against whole numbers of any size."""

import numpy as np
import pytest
from test_knn import unit

from curation.algorithms.products import NONE, Floats, Ints
from curation.algorithms.ranking import Ranking
from curation.algorithms.scans import Within


def on_grid(rows: Floats, largest: Floats) -> Floats:
    """Rows in steps of the least power of two by which `largest` is at most 127 of them."""
    step = 2.0 ** np.arange(-40, 40.0)
    chosen = step[np.argmax(np.rint(largest / step) <= 127, axis=1)][:, None]
    whole: Floats = np.rint(rows / chosen) * chosen
    return whole


def ranked(rows: Floats, columns: Floats) -> tuple[Floats, Ints]:
    """All columns by falling score, equal ones by number, and the scores."""
    left = on_grid(rows.astype(np.float64), np.abs(rows).max(axis=1, keepdims=True))
    right = on_grid(columns.astype(np.float64), np.abs(columns).max(keepdims=True))
    scores = left @ right.T
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, axis=1), order


@pytest.mark.usefixtures("multiplied_in")
@pytest.mark.parametrize("dim", [1, 24, 384])
@pytest.mark.parametrize(("columns", "count"), [(20, 3), (300, 7), (300, 200), (1500, 7), (9, 99)])
def test_the_nearest_are_exact(columns: int, count: int, dim: int) -> None:
    rows, fixed = unit(70, dim, 0), unit(columns, dim, 1)
    fixed[columns // 2 :] = fixed[: -(columns // 2)]  # each twice
    score, column = Ranking(fixed).nearest(rows, count)
    truth, wanted = ranked(rows, fixed)
    np.testing.assert_array_equal(score, truth[:, :count])
    np.testing.assert_array_equal(column, wanted[:, :count])


@pytest.mark.usefixtures("multiplied_in")
@pytest.mark.parametrize("columns", [5, 300, 1500])
@pytest.mark.parametrize("most", [4, 40])
@pytest.mark.parametrize("margin", [-np.inf, -0.1, 0.0, 0.2, np.inf])
@pytest.mark.parametrize("falling", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("least", [1, 3, 20])
def test_near_are_those_within(
    columns: int, margin: float, most: int, falling: float, least: int
) -> None:
    rows, fixed = unit(70, 24, 0), unit(columns, 24, 1)
    fixed[columns // 2 :] = fixed[: -(columns // 2)]
    margins = (margin - falling * np.arange(most)).astype(np.float32)
    found = Ranking(fixed).near(rows, Within(0.85, margins, least))
    truth, wanted = ranked(rows, fixed)
    lowest = np.float32(0.85) * truth[:, :1].astype("f4") - margins[:columns]
    inside = truth[:, :most] >= lowest
    inside[:, :least] = True
    rest = most - inside.shape[1]
    exact = np.where(inside, wanted[:, :most], NONE)
    np.testing.assert_array_equal(
        found, np.pad(exact, ((0, 0), (0, max(0, rest))), constant_values=NONE)
    )


@pytest.mark.parametrize("largest", [127.3, 127.4, 127.45, 127.5, 127.6, 128.0, 64.0, 63.9])
def test_numbers_near_a_power_of_two_fit_seven_bits(largest: float) -> None:
    rows = np.array([[largest, -1.0, 0.3]], np.float32) / 256
    score, _ = Ranking(np.array([[1.0, 0.0, 0.0]], np.float32)).nearest(rows, 1)
    assert score[0, 0] == pytest.approx(rows[0, 0], abs=1 / 256)


def test_zeros_are_as_near_to_all() -> None:
    score, column = Ranking(unit(9, 8, 0)).nearest(np.zeros((2, 8), np.float32), 9)
    assert not score.any()
    assert (column == np.arange(9)).all()
    score, column = Ranking(np.zeros((9, 8), np.float32)).nearest(unit(2, 8, 0), 9)
    assert not score.any()
    assert (column == np.arange(9)).all()
