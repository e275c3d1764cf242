"""Cells and the way to them against comparing all."""

import numpy as np
import pytest
from test_knn import NEAR_EQUAL, around, unit

from curation.algorithms.best import NONE
from curation.algorithms.cells import AGREEMENT, FAR_CELLS, Cells
from curation.algorithms.products import Floats


def fitted(rows: Floats, count: int) -> Cells:
    return Cells.fit(rows, count, np.random.default_rng(0))


@pytest.mark.parametrize("count", [1, 15, 90])
def test_all_axes_give_the_nearest_cells(count: int) -> None:
    rows = unit(3000, 12, 0)
    cells = fitted(rows, count)
    found = cells.exact().nearest(rows[:500], 7)
    scores = rows[:500].astype(np.float64) @ cells.centroids.T.astype(np.float64)
    wanted = np.argsort(-scores, axis=1, kind="stable")[:, :7]
    np.testing.assert_array_equal(found.number, wanted)
    assert cells.axes.shape == (12, 12)
    np.testing.assert_allclose(np.linalg.norm(cells.centroids, axis=1), 1, atol=1e-5)


def test_few_axes_agree_with_all() -> None:
    spread = np.diag(np.arange(1, 257) ** -0.5)
    rows = unit(9000, 256, 1) @ spread
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    cells = fitted(rows[:6000], 200)
    assert cells.axes.shape[1] < 256
    assert (
        cells.assign(rows[6000:]) == cells.exact().assign(rows[6000:])
    ).mean() > AGREEMENT - 0.01
    assert cells.wider().is_exact


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


def test_rows_far_from_all_cells_ask_in_more() -> None:
    rows = np.concatenate([around(40, 4000, 32, 0.1, 0), unit(400, 32, 1)])  # and noise
    cells = fitted(rows[:4000], 60)
    way = cells.way(rows, 5)
    assert way.shape == (4400, 5 * FAR_CELLS)
    np.testing.assert_array_equal(way[:, :5], cells.nearest(rows, 5).number)
    wide = (way[:, 5:] != NONE).all(axis=1)
    assert ((way[:, 5:] == NONE).all(axis=1) | wide).all()
    assert 0.1 < wide[:4000].mean() < 0.2
    assert wide[4000:].mean() > 0.9
    np.testing.assert_array_equal(way[wide], cells.nearest(rows[wide], 5 * FAR_CELLS).number)


def test_near_cells_have_near_numbers() -> None:
    centroids = fitted(around(40, 6000, 32, 0.3, 0), 300).centroids
    next_ones = np.einsum("cd,cd->c", centroids[1:], centroids[:-1])
    assert next_ones.mean() > (centroids @ centroids.T).mean() + 0.3
