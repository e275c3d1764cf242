"""Cells and the way to them against comparing all."""

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from test_knn import NEAR_EQUAL, around, unit

from curation.algorithms import cells as module
from curation.algorithms.assign import Assigner, assign
from curation.algorithms.best import NONE
from curation.algorithms.cells import AGREEMENT, Cells, GroupedAssigner, make_assigner
from curation.algorithms.kmeans import Options, fit
from curation.algorithms.products import Floats


@pytest.fixture(autouse=True)
def one_thread() -> Iterable[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def few_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLAT", 20)


def fitted(rows: Floats, count: int) -> Cells:
    return Cells.fit(rows, count, np.random.default_rng(0))


@pytest.mark.parametrize("count", [1, 15, 90])
def test_all_axes_give_the_nearest_cells(few_flat: None, count: int) -> None:
    rows = unit(3000, 12, 0)
    cells = fitted(rows, count)
    found = cells.exact().nearest(rows[:500], 7)
    scores = rows[:500].astype(np.float64) @ cells.centroids.T.astype(np.float64)
    wanted = np.argsort(-scores, axis=1, kind="stable")[:, :7]
    np.testing.assert_array_equal(found.number, wanted)
    assert cells.axes.shape == (12, 12)
    np.testing.assert_allclose(np.linalg.norm(cells.centroids, axis=1), 1, atol=1e-5)


def test_few_axes_agree_with_all(few_flat: None) -> None:
    spread = np.diag(np.arange(1, 129) ** -0.5)
    rows = unit(9000, 128, 1) @ spread
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    cells = fitted(rows[:6000], 200)
    assert cells.axes.shape[1] < 128
    assert (
        cells.assign(rows[6000:]) == cells.exact().assign(rows[6000:])
    ).mean() > AGREEMENT - 0.01
    assert cells.wider().axes.shape[1] == 2 * cells.axes.shape[1]


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
def test_every_row_has_a_cell(few_flat: None, rows: Floats) -> None:
    cells = fitted(rows, 64)
    found = cells.assign(rows)
    assert ((found >= 0) & (found < len(cells))).all()
    assert np.isfinite(cells.centroids).all()


def test_fewer_cells_than_asked_are_filled_up() -> None:
    cells = fitted(unit(9, 8, 0), 5)
    found = cells.nearest(unit(2, 8, 1), 50)
    assert found.number.shape == (2, len(cells))
    assert (found.number != NONE).all()


def test_grouped_centroids_are_nearly_always_the_nearest() -> None:
    rows, centroids = around(60, 20_000, 32, 0.1, 0), around(60, 2000, 32, 0.1, 1)
    cluster, score = GroupedAssigner()(rows, centroids)
    wanted, best = assign(rows, centroids)
    assert (cluster == wanted).mean() >= AGREEMENT - 0.003
    assert Cells.over(centroids, rows[::10]).beam < 45 / 2  # of about 45 groups
    alike = cluster == wanted
    np.testing.assert_array_equal(score[alike], best[alike])
    own = np.einsum("nd,nd->n", rows.astype(np.float64), centroids[cluster].astype(np.float64))
    np.testing.assert_allclose(score, own, atol=1e-7)
    torch.set_num_threads(2)
    again = GroupedAssigner()(rows, centroids)
    assert (again[0].tobytes(), again[1].tobytes()) == (cluster.tobytes(), score.tobytes())


def test_grouped_kmeans_ends_where_exact_kmeans_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = around(3000, 20_000, 32, 0.1, 0)  # hardly any structure above the 3,000

    def objective(options: Options) -> tuple[float, ...]:
        return fit(rows, 2000, 5, np.random.default_rng(0), options).objective

    exact = objective(Options(make_assigner=Assigner))
    assert objective(Options()) == exact  # not many
    with_memory = objective(Options(make_assigner=GroupedAssigner))
    monkeypatch.setattr(module, "MANY", 1999)
    by_default = objective(Options())
    for reached in (with_memory, by_default):
        assert reached != exact
        assert reached[-1] > (1 - 1e-3) * exact[-1]  # it may end in a better place, too
        assert reached[-1] == pytest.approx(exact[-1], rel=5e-3)
        assert (np.diff(reached) > 0).all()


def test_a_row_keeps_its_centroid_when_none_nearer_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, centroids = unit(500, 48, 0), unit(400, 48, 1)
    exact, _ = assign(rows, centroids)
    assigner = GroupedAssigner()
    assigner(rows, centroids)
    monkeypatch.setattr(module, "AGREEMENT", 0.0)
    monkeypatch.setattr(module, "LOSS", np.inf)
    seen, _ = GroupedAssigner()(rows, centroids)
    assert (seen != exact).mean() > 0.01  # now most groups go unseen
    cluster, score = assigner(rows, centroids)
    assert (cluster == exact).mean() > 0.99
    assert (score >= assigner(rows, centroids)[1]).all()
    assert assigner(rows[:9], centroids[:3])[0].max() < 3  # other rows: a new start


@pytest.mark.parametrize(
    "centroids",
    [
        np.repeat(unit(1, 8, 0), 300, axis=0),
        np.repeat(unit(40, 8, 0), 10, axis=0),
        NEAR_EQUAL[:300],
        unit(1, 8, 3),
        np.concatenate([unit(50, 8, 0), -unit(50, 8, 0)]),
    ],
    ids=["equal", "copies", "near equal", "one", "opposite"],
)
def test_adversarial_centroids_are_assigned(centroids: Floats) -> None:
    for rows in (unit(700, 8, 5), unit(1, 8, 6), np.empty((0, 8), np.float32), centroids):
        cluster, score = GroupedAssigner()(rows, centroids)
        _, best = assign(rows, centroids)
        assert (score >= best - 1e-6).mean() >= AGREEMENT if len(rows) else len(cluster) == 0
        if len(rows) and len(np.unique(centroids, axis=0)) * 2 < len(centroids):
            first = (centroids[:, None] == centroids[cluster][None]).all(axis=2).argmax(axis=0)
            np.testing.assert_array_equal(cluster, first)  # a repeated centroid gets no rows


def test_plain_kmeans_of_many_compares_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="plain k-means compares with all"):
        GroupedAssigner(spherical=False)
    monkeypatch.setattr(module, "MANY", 5)
    rows, centroids = unit(50, 8, 0) * 3, unit(20, 8, 1)
    cluster, _ = make_assigner(False)(rows, centroids)
    np.testing.assert_array_equal(cluster, assign(rows, centroids, False)[0])
