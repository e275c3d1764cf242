"""Assignment through groups of centroids, against comparing all."""

import numpy as np
import pytest
import torch
from test_knn import NEAR_EQUAL, around, unit

from curation.algorithms import groups as module
from curation.algorithms.assign import Assigner, assign, scores_of
from curation.algorithms.groups import AGREEMENT, GroupedAssigner, Groups, make_assigner
from curation.algorithms.kmeans import Options, fit
from curation.algorithms.products import Floats


def test_grouped_centroids_are_nearly_always_the_nearest() -> None:
    rows, centroids = around(60, 20_000, 32, 0.1, 0), around(60, 2000, 32, 0.1, 1)
    cluster = GroupedAssigner()(rows, centroids)
    wanted, _ = assign(rows, centroids)
    assert (cluster == wanted).mean() >= AGREEMENT - 0.003
    assert Groups.over(centroids, rows[::10]).beam < 45 / 2  # of about 45 groups
    torch.set_num_threads(2)
    assert GroupedAssigner()(rows, centroids).tobytes() == cluster.tobytes()


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
    seen = GroupedAssigner()(rows, centroids)
    assert (seen != exact).mean() > 0.01  # now most groups go unseen
    assert (assigner(rows, centroids) == exact).mean() > 0.99
    assert assigner(rows[:9], centroids[:3]).max() < 3  # other rows: a new start


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
        cluster = GroupedAssigner()(rows, centroids)
        score = scores_of(rows, centroids, cluster)
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
    cluster = make_assigner(False)(rows, centroids)
    np.testing.assert_array_equal(cluster, assign(rows, centroids, False)[0])
