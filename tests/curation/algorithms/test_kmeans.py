"""k-means against brute force in fp64 and against faiss; the same bytes however it is done."""

from collections.abc import Callable, Iterable
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_knn import unit

from curation.algorithms import assign as assigning
from curation.algorithms.assign import NEAR, Assigner, assign
from curation.algorithms.kmeans import Options, first_centroids, fit, fit_blocks, look
from curation.algorithms.lloyd import BlockSweep, Clustering, Metric, Totals, lloyd
from curation.algorithms.products import Floats, Ints

PLAIN = Options(spherical=False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterable[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def blobs(seed: int) -> Floats:
    """6 tight groups of 50 unit rows."""
    rng = np.random.default_rng(seed)
    rows = np.repeat(unit(6, 16, seed), 50, axis=0) + 0.05 * rng.standard_normal((300, 16))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def nearest(rows: Floats, centroids: Floats, spherical: bool = True) -> Ints:
    """By products in fp64, ties to the smaller number."""
    wide = centroids.astype(np.float64)
    bias = np.zeros(len(wide)) if spherical else -0.5 * (wide**2).sum(axis=1)
    found: Ints = (rows.astype(np.float64) @ wide.T + bias).argmax(axis=1)
    return found


def brute_force(rows: Floats, start: Floats, iterations: int, spherical: bool) -> np.ndarray:
    """Lloyd's iterations in fp64, for data that leaves no cluster empty."""
    centroids = start.astype(np.float64)
    for _ in range(iterations):
        cluster = nearest(rows, centroids, spherical)
        centroids = np.stack(
            [rows[cluster == k].mean(axis=0, dtype=np.float64) for k in range(len(start))]
        )
        if spherical:
            centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    return centroids


def cut(rows: Floats, size: int) -> Callable[[], list[Floats]]:
    return lambda: [rows[at : at + size] for at in range(0, len(rows), size)]


def same(one: Clustering, other: Clustering) -> bool:
    return (one.centroids.tobytes(), one.objective) == (other.centroids.tobytes(), other.objective)


@pytest.mark.parametrize("spherical", [True, False])
def test_assign_is_the_nearest_centroid(spherical: bool) -> None:
    rows, centroids = unit(5000, 24, 0), unit(37, 24, 1)
    if not spherical:
        centroids = centroids * np.linspace(0.5, 2, 37, dtype=np.float32)[:, None]
    cluster, score = assign(rows, centroids, spherical)
    np.testing.assert_array_equal(cluster, nearest(rows, centroids, spherical))
    if spherical:
        np.testing.assert_allclose(score, (rows @ centroids.T).max(axis=1), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize("k", [1, NEAR - 1, NEAR, 60, 300])
def test_an_assigner_of_moving_centroids_is_exact(
    k: int, spherical: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With copies, ties between opposite sides, repeated centroids; small and large movements."""
    monkeypatch.setattr(assigning, "fast_dtype", lambda: dtype)
    rng = np.random.default_rng(k)
    rows = np.concatenate([unit(900, 8, 0), np.repeat(unit(3, 8, 1), 200, axis=0)])
    rows[:100] = np.eye(8, dtype=np.float32)[rng.integers(0, 8, 100)]
    centroids = rows[rng.choice(len(rows), k)].copy()
    assigner = Assigner(spherical)
    for step in (0, 1e-4, 1e-2, 0.3, 0, 1e-3, 1):
        moved = rng.random(k) < 0.7
        centroids = centroids.copy()
        centroids[moved] += step * rng.standard_normal((moved.sum(), 8)).astype(np.float32)
        if spherical:
            centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
        centroids[rng.integers(k)] = centroids[rng.integers(k)]
        found = assigner(rows, centroids)
        np.testing.assert_array_equal(found, nearest(rows, centroids, spherical), str(step))


@pytest.mark.parametrize("spherical", [True, False])
def test_bounds_hold_for_centroids_that_wander_and_come_back(
    spherical: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assigning, "MOST_CALLS", 5)
    rng = np.random.default_rng(7)
    rows, home = unit(1500, 6, 3), unit(200, 6, 4)
    assigner = Assigner(spherical)
    for call in range(60):
        away = rng.random(200) < rng.choice([0.02, 0.2, 0.6])
        centroids = home.copy()
        centroids[away] += rng.choice([0.01, 0.1, 0.5]) * rng.standard_normal(
            (away.sum(), 6)
        ).astype(np.float32)
        if call % 7 == 0:
            home = centroids.copy()
        found = assigner(rows, centroids)
        np.testing.assert_array_equal(found, nearest(rows, centroids, spherical), str(call))


@pytest.mark.parametrize("spherical", [True, False])
def test_iterations_are_those_of_brute_force(spherical: bool) -> None:
    rows = unit(900, 16, 2) * (1 if spherical else 3)
    options = Options(spherical)
    count, metric = look(lambda: [rows], spherical)
    start = first_centroids(lambda: [rows], count, 9, np.random.default_rng(1), "random", metric)
    result = fit(rows, 9, 8, np.random.default_rng(1), options)
    expected = brute_force(rows, start, len(result.objective), spherical)
    np.testing.assert_allclose(result.centroids, expected, atol=1e-6)
    better = np.diff(result.objective) * (1 if spherical else -1)
    assert (better > -1e-9).all()


@pytest.mark.parametrize("spherical", [True, False])
def test_the_objective_is_that_of_faiss_from_the_same_start(spherical: bool) -> None:
    rows = unit(4000, 32, 3) * (1 if spherical else 7)
    metric = look(lambda: [rows], spherical)[1]
    rng = np.random.default_rng(0)
    start = first_centroids(lambda: [rows], len(rows), 40, rng, "random", metric)
    ours = fit(rows, 40, 25, np.random.default_rng(0), Options(spherical)).centroids
    theirs = faiss.Kmeans(32, 40, niter=25, spherical=spherical, max_points_per_centroid=1000)
    theirs.train(rows, init_centroids=start)
    reached = []
    for centroids in (ours, theirs.centroids):
        score = assign(rows, centroids, spherical)[1].astype(np.float64)
        reached.append(
            score.mean() if spherical else (rows**2).sum(axis=1).mean() - 2 * score.mean()
        )
    assert reached[0] == pytest.approx(reached[1], rel=1e-4)


@pytest.mark.parametrize("options", [Options(), PLAIN, Options(start="k-means++")])
def test_blocks_threads_and_assigners_give_the_same_bytes(options: Options) -> None:
    rows = unit(3000, 16, 4)
    if not options.spherical:
        rows = rows * np.random.default_rng(0).uniform(0.1, 5, (3000, 1)).astype(np.float32)

    def run(blocks: Callable[[], Iterable[Floats]], options: Options) -> Clustering:
        return fit_blocks(blocks, 20, 9, np.random.default_rng(7), options)

    whole = fit(rows, 20, 9, np.random.default_rng(7), options)
    for size in (1, 700, 2999):
        assert same(run(cut(rows[:200] if size == 1 else rows, size), options), whole) or size == 1
    few = fit(rows[:200], 20, 9, np.random.default_rng(7), options)
    assert same(run(cut(rows[:200], 1), options), few)
    torch.set_num_threads(2)
    assert same(run(cut(rows, 1300), options), whole)

    def afresh(spherical: bool) -> Any:
        return lambda rows, centroids: assign(rows, centroids, spherical)[0]

    assert same(run(cut(rows, 1300), Options(options.spherical, options.start, afresh)), whole)
    assert not same(fit(rows, 20, 9, np.random.default_rng(8), options), whole)


def test_random_rows_settle_on_a_sample_first() -> None:
    """Ten cheap iterations are worth more than the first one with all rows."""
    rows, rng = unit(20_000, 16, 4), np.random.default_rng(0)
    settled = fit(rows, 50, 2, rng)
    from_rows = lloyd(
        Clustering(rows[:50], ()), BlockSweep(lambda: [rows], Metric(), Assigner), 2, Metric()
    )
    assert settled.objective[0] > from_rows.objective[1]


def test_a_fit_that_goes_on_is_one_that_never_stopped() -> None:
    rows, k = blobs(5), 7
    noted: list[Clustering] = []
    whole = fit(rows, k, 100, np.random.default_rng(3), note=noted.append)
    assert whole is noted[-1]
    assert whole.rests
    assert [len(now.objective) for now in noted] == list(range(1, len(noted) + 1))

    def sweep(centroids: Floats) -> Totals:
        totals = Totals.empty(*centroids.shape)
        totals.add(rows, assign(rows, centroids)[0], Metric())
        return totals

    for now in noted:
        assert same(lloyd(now, sweep, 100, Metric()), whole)


def test_kmeans_plus_plus_finds_far_groups_among_copies() -> None:
    """Of most rows copies of one: random starts are nearly all alike."""
    far = unit(9, 16, 0)
    rows = np.concatenate([np.repeat(far[:1], 4000, axis=0), np.repeat(far[1:], 100, axis=0)])
    found = fit(rows, 9, 5, np.random.default_rng(0), Options(start="k-means++"))
    assert found.objective[-1] == pytest.approx(1, abs=1e-6)
    assert len(np.unique(assign(rows, found.centroids)[0])) == 9
    assert fit(rows, 9, 5, np.random.default_rng(0)).objective[-1] < 0.99


ADVERSARIAL: dict[str, Floats] = {
    "all equal": np.repeat(unit(1, 8, 0), 300, axis=0),
    "copies": np.repeat(unit(4, 8, 0), [1, 2000, 3, 1], axis=0),
    "opposite": np.concatenate([np.repeat(unit(1, 8, 0), 9, 0), -np.repeat(unit(1, 8, 0), 9, 0)]),
    "one giant": np.concatenate([unit(1, 8, 0) + 0 * unit(500, 8, 1), unit(5, 8, 2)]),
    "few": unit(5, 8, 1),
    "one row": unit(1, 8, 1),
    "one dimension": np.ones((20, 1), np.float32),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("k", [1, 7, 1000])
@pytest.mark.parametrize("options", [Options(), PLAIN, Options(start="k-means++")])
def test_adversarial_rows_end_well(name: str, k: int, options: Options) -> None:
    rows = ADVERSARIAL[name]
    result = fit(rows, k, 10, np.random.default_rng(0), options)
    assert len(result.centroids) == min(k, len(rows))
    assert np.isfinite(result.centroids).all()
    assert np.isfinite(result.objective).all()
    if options.spherical:
        np.testing.assert_allclose(np.linalg.norm(result.centroids, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("scale", [0, 1e-20, 1e15])
def test_plain_rows_of_any_size(scale: float) -> None:
    rows = unit(200, 8, 0) * np.float32(scale)
    result = fit(rows, 5, 10, np.random.default_rng(0), PLAIN)
    if scale:
        expected = fit(unit(200, 8, 0), 5, 10, np.random.default_rng(0), PLAIN)
        np.testing.assert_allclose(result.centroids / scale, expected.centroids, atol=1e-5)
    else:
        assert not result.centroids.any()


@pytest.mark.parametrize(
    ("rows", "k", "options", "fault"),
    [
        (np.empty((0, 4)), 3, Options(), "there are no rows"),
        (unit(9, 4, 0), 0, Options(), "k must be at least 1, got 0"),
        (unit(9, 4, 0)[0], 3, Options(), "must be an array"),
        (np.r_[unit(3, 4, 0), np.full((1, 4), np.nan)], 2, Options(), r"not finite \(rows 3\)"),
        (np.r_[unit(3, 4, 0), np.full((1, 4), np.inf)], 2, PLAIN, r"not finite \(rows 3\)"),
        (np.r_[np.zeros((1, 4)), unit(3, 4, 0)], 2, Options(), r"not of norm 1 \(rows 0\)"),
        (5 * unit(3, 4, 0), 2, Options(), r"not of norm 1 \(rows 0, 1, 2\)"),
    ],
)
def test_what_cannot_be_clustered_is_named(
    rows: Floats, k: int, options: Options, fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        fit(rows, k, 5, np.random.default_rng(0), options)


def totals_of(rows: Floats, cluster: Ints, groups: list[Ints], metric: Metric) -> Totals:
    """Each group of positions by itself, then merged."""
    whole = Totals.empty(4, rows.shape[1])
    for group in groups:
        one = Totals.empty(4, rows.shape[1])
        one.add(rows[group], cluster[group], metric)
        whole.merge(one)
    return whole


def equal(one: Totals, other: Totals) -> bool:
    return bool(
        np.array_equal(one.sums, other.sums)
        and np.array_equal(one.counts, other.counts)
        and one.squares == other.squares
    )


@given(
    count=st.integers(1, 60),
    seed=st.integers(0, 9999),
    parts=st.integers(1, 6),
    spherical=st.booleans(),
)
def test_totals_do_not_depend_on_grouping_and_moving_is_adding(
    count: int, seed: int, parts: int, spherical: bool
) -> None:
    rng = np.random.default_rng(seed)
    rows = unit(count, 11, seed)
    metric = Metric() if spherical else Metric.plain(1.0)
    before, after = rng.integers(0, 4, (2, count))
    whole = totals_of(rows, after, [np.arange(count)], metric)
    order, group = rng.permutation(count), rng.integers(0, parts, count)
    groups = [order[group == number] for number in range(parts)]
    assert equal(totals_of(rows, after, groups, metric), whole)
    moved = Totals.empty(4, 11)
    moved.add(rows, before, metric)
    moved.move(rows, before, after, metric)
    assert equal(moved, whole)
    wide = np.zeros((4, 11))
    np.add.at(wide, after, rows.astype(np.float64))
    np.testing.assert_allclose(whole.sums / 2.0**30, wide, atol=1e-7)
