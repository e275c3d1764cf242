"""Cells and the way to them against comparing all."""

import numpy as np
import pytest
from test_knn import NEAR_EQUAL, around, unit
from test_ranking import ranked

from curation.algorithms.cells import LEAST, NEAR_SHARE, RISE, Cells, Reach
from curation.algorithms.products import NONE, Floats


def fitted(rows: Floats, count: int) -> Cells:
    return Cells.fit(rows, count, np.random.default_rng(0))


@pytest.mark.usefixtures("multiplied_in")
@pytest.mark.parametrize(("count", "wanted"), [(1, 7), (15, 7), (90, 1), (400, 7), (400, 300)])
def test_the_nearest_cells_are_those_of_the_grid(count: int, wanted: int) -> None:
    rows = unit(3000, 12, 0)
    cells = fitted(rows, count)
    found = cells.nearest(rows[:1500], wanted)
    score, number = ranked(rows[:1500], cells.centroids)
    np.testing.assert_array_equal(found.number, number[:, :wanted])
    np.testing.assert_array_equal(found.score, score[:, :wanted])
    np.testing.assert_allclose(np.linalg.norm(cells.centroids, axis=1), 1, atol=1e-5)


def test_of_equal_cells_the_first_is_nearer() -> None:
    cells = Cells(np.repeat(unit(3, 8, 0), 90, axis=0))
    found = cells.nearest(cells.centroids, 100).number
    np.testing.assert_array_equal(
        found[:, :90], 90 * np.repeat([0, 1, 2], 90)[:, None] + np.arange(90)
    )
    assert (np.diff(found[:, 90:], axis=1) == 1).all()


@pytest.mark.parametrize(
    "rows",
    [
        np.repeat(unit(1, 8, 0), 2000, axis=0),
        np.repeat(unit(5, 8, 0), 400, axis=0),
        NEAR_EQUAL[:2000],
        np.zeros((2000, 8), np.float32),
        np.concatenate([np.zeros((1900, 8), np.float32), unit(100, 8, 0)]),
        np.concatenate([unit(1000, 8, 0), -unit(1000, 8, 0)]),
        unit(1, 8, 0),
        np.ones((50, 1), np.float32),
    ],
    ids=["equal", "copies", "near equal", "zeros", "mostly zeros", "opposite", "one", "1-d"],
)
def test_every_row_has_a_cell(rows: Floats) -> None:
    cells = fitted(rows, 64)
    found = cells.assign(rows)
    assert ((found >= 0) & (found < len(cells))).all()
    assert np.isfinite(cells.centroids).all()


def test_fewer_cells_than_asked_are_filled_up() -> None:
    cells = fitted(unit(9, 8, 0), 5)
    found = cells.nearest(unit(2, 8, 1), 50)
    assert found.number.shape == (2, len(cells))
    assert (found.number != NONE).all()


@pytest.mark.usefixtures("multiplied_in")
@pytest.mark.parametrize(("margin", "most"), [(0.0, 40), (0.1, 9), (-np.inf, 3), (np.inf, 7)])
def test_rows_ask_in_cells_that_score_nearly_as_their_nearest(margin: float, most: int) -> None:
    rows = np.concatenate([around(40, 1000, 32, 0.1, 0), unit(400, 32, 1)])  # and noise
    cells = fitted(rows[:1000], 60)
    way = cells.way(rows, Reach(margin, most))
    near = cells.nearest(rows, most)
    lowest = NEAR_SHARE * near.score[:, :1] - margin + RISE * np.log1p(np.arange(most))
    asked = near.score >= lowest
    asked[:, :LEAST] = True
    sure = np.abs(near.score - lowest) > 1e-5
    np.testing.assert_array_equal((way == np.where(asked, near.number, NONE))[sure], True)


def test_noise_asks_in_more_cells() -> None:
    rows = np.concatenate([around(40, 4000, 32, 0.1, 0), unit(400, 32, 1)])
    asked = (fitted(rows[:4000], 60).way(rows, Reach(0.2, 40)) != NONE).sum(axis=1)
    assert asked[:4000].mean() < 5 < 6 < asked[4000:].mean()


def test_near_cells_have_near_numbers() -> None:
    centroids = fitted(around(40, 6000, 32, 0.3, 0), 300).centroids
    next_ones = np.einsum("cd,cd->c", centroids[1:], centroids[:-1])
    assert next_ones.mean() > (centroids @ centroids.T).mean() + 0.3
