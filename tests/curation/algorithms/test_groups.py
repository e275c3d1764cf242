"""Assignment through groups of centroids, against comparing all."""

import numpy as np
import pytest
import torch
from test_knn import NEAR_EQUAL, around, unit

from curation.algorithms import groups as module
from curation.algorithms.assign import Assigner, assign, assigner, scores_of
from curation.algorithms.groups import AGREEMENT, GroupedAssigner, Groups, assigners
from curation.algorithms.kmeans import Options, fit, fit_blocks
from curation.algorithms.products import Floats


def test_grouped_centroids_are_nearly_always_the_nearest() -> None:
    rows, centroids = around(60, 20_000, 32, 0.1, 0), around(60, 2000, 32, 0.1, 1)
    cluster = GroupedAssigner(rows[::10])(rows, centroids)
    wanted, _ = assign(rows, centroids)
    assert (cluster == wanted).mean() >= AGREEMENT - 0.003
    assert Groups.over(centroids, rows[::10]).beam < 45 / 2  # of about 45 groups
    torch.set_num_threads(2)
    assigner = GroupedAssigner(rows[::10])
    for block in (slice(100, 4321), slice(0, 1), slice(0, 20_000)):  # whatever came before
        assert assigner(rows[block], centroids).tobytes() == cluster[block].tobytes()


def test_grouped_kmeans_ends_where_exact_kmeans_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = around(3000, 20_000, 32, 0.1, 0)  # hardly any structure above the 3,000

    def objective(options: Options) -> tuple[float, ...]:
        return fit(rows, 2000, 5, np.random.default_rng(0), options).objective

    exact = objective(Options(make_assigner=Assigner))
    assert objective(Options()) == exact  # not many
    monkeypatch.setattr(module, "MANY", 1999)
    reached = objective(Options())
    assert reached != exact
    assert reached[-1] > (1 - 1e-3) * exact[-1]  # it may end in a better place, too
    assert reached[-1] == pytest.approx(exact[-1], rel=5e-3)
    assert (np.diff(reached) > 0).all()


def test_a_fit_of_many_is_the_same_however_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MANY", 199)
    rows = around(300, 6000, 32, 0.1, 0)
    whole = fit(rows, 200, 4, np.random.default_rng(0))
    blocks = [rows[:0], rows[:7], rows[7:4000], rows[4000:4000], rows[4000:]]
    cut = fit_blocks(lambda: blocks, 200, 4, np.random.default_rng(0))
    assert cut.centroids.tobytes() == whole.centroids.tobytes()
    assert cut.objective == whole.objective


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
        cluster = GroupedAssigner(rows)(rows, centroids)
        score = scores_of(rows, centroids, cluster)
        _, best = assign(rows, centroids)
        assert (score >= best - 1e-6).mean() >= AGREEMENT if len(rows) else len(cluster) == 0
        if len(rows) and len(np.unique(centroids, axis=0)) * 2 < len(centroids):
            first = (centroids[:, None] == centroids[cluster][None]).all(axis=2).argmax(axis=0)
            np.testing.assert_array_equal(cluster, first)  # a repeated centroid gets no rows


def test_plain_kmeans_of_many_compares_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MANY", 5)
    assert assigners(False, 20, lambda: unit(5, 8, 0)) is assigner
    assert assigners(True, 5, lambda: unit(5, 8, 0)) is assigner
    assert isinstance(assigners(True, 20, lambda: unit(5, 8, 0))(True), GroupedAssigner)
