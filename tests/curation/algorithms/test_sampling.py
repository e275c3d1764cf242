"""Draws are uniform, bounded and independent of order; backfill gives every query its own."""

import numpy as np

from curation.algorithms.sampling import backfill, draw_by_cluster, priorities


def test_priorities_depend_on_the_image_and_the_seed_alone_and_are_spread_evenly() -> None:
    words = np.random.default_rng(0).integers(0, 2**63, 20_000).astype(np.uint64)
    one = priorities(words, 3)
    np.testing.assert_array_equal(one[::-1], priorities(words[::-1], 3))
    assert (one != priorities(words, 4)).all()
    histogram = np.histogram(one.astype(np.float64), bins=10, range=(0, 2.0**64))[0]
    assert abs(histogram - 2000).max() < 200


def test_draws_respect_both_quotas_and_take_what_small_clusters_have() -> None:
    cluster = np.repeat([0, 1, 2], [100, 3, 50])
    priority = priorities(np.arange(153).astype(np.uint64), 0)
    drawn = draw_by_cluster(cluster, priority, per_cluster=10, cap=1000)
    assert np.bincount(cluster[drawn]).tolist() == [10, 3, 10]
    capped = draw_by_cluster(cluster, priority, per_cluster=10, cap=7)
    assert len(capped) == 7
    assert set(capped) <= set(drawn)


def test_each_cluster_may_have_its_own_quota() -> None:
    cluster = np.repeat([0, 1, 2, 4], [5, 3, 50, 2])
    priority = priorities(np.arange(60).astype(np.uint64), 0)
    quota = np.array([2, 9, 0, 7, 1])
    drawn = draw_by_cluster(cluster, priority, quota, 60)
    assert np.bincount(cluster[drawn]).tolist() == [2, 3, 0, 0, 1]
    for one, count in enumerate(quota):
        alone = draw_by_cluster(cluster, priority, int(count), 60)
        assert set(drawn[cluster[drawn] == one]) == set(alone[cluster[alone] == one])


def test_drawing_in_steps_is_drawing_at_once() -> None:
    rng = np.random.default_rng(1)
    cluster = rng.integers(0, 8, 500)
    priority = priorities(np.arange(500).astype(np.uint64), 5)
    whole = draw_by_cluster(cluster, priority, 6, 30)
    first = draw_by_cluster(cluster[:250], priority[:250], 6, 250)
    rows = np.concatenate([first, np.arange(250, 500)])
    stepwise = rows[draw_by_cluster(cluster[rows], priority[rows], 6, 30)]
    np.testing.assert_array_equal(whole, stepwise)


def test_backfill_gives_each_query_its_own_images_the_nearest_first() -> None:
    cosine = np.array([[0.9, 0.8, 0.1], [0.95, 0.7, 0.6]], np.float32)
    number = np.array([[1, 2, 3], [1, 2, 4]])
    taken = backfill(cosine, number, k=1)
    assert taken.tolist() == [[False, True, False], [True, False, False]]
    taken = backfill(cosine, number, k=2)
    assert taken.tolist() == [[False, True, True], [True, False, True]]


def test_backfill_ends_when_candidates_do() -> None:
    cosine = np.array([[0.9, -np.inf], [0.8, -np.inf]], np.float32)
    number = np.array([[5, -1], [5, -1]])
    assert backfill(cosine, number, k=2).tolist() == [[True, False], [False, False]]
    assert backfill(np.empty((0, 0), np.float32), np.empty((0, 0), int), k=2).shape == (0, 0)
