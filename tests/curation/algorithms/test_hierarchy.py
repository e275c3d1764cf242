"""Shares are those of one image at a time; draws from a planted hierarchy are even over it."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curation.algorithms import kmeans
from curation.algorithms.assign import assign
from curation.algorithms.hierarchy import (
    Floats,
    Ints,
    evenness,
    fit_flat,
    grow,
    nearest_of_each,
    share,
    sizes_of_levels,
    top_down,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


families = st.lists(
    st.tuples(st.integers(0, 60), st.lists(st.integers(0, 12), min_size=1, max_size=8)),
    min_size=1,
    max_size=6,
)


def one_at_a_time(total: int, sizes: list[int]) -> list[int]:
    """Rounds in which every child that has images left gets one; the largest first."""
    given = [0] * len(sizes)
    first = sorted(range(len(sizes)), key=lambda child: (-sizes[child], child))
    while total and given != sizes:
        for child in first:
            if total and given[child] < sizes[child]:
                given[child] += 1
                total -= 1
    return given


def whole(total: int, sizes: list[int]) -> list[int]:
    only = np.zeros(len(sizes), np.int64)
    return share(np.array([total]), np.array(sizes), only).tolist()


@given(family=families, seed=st.integers(0, 99))
def test_shares_are_those_of_one_image_at_a_time(
    family: list[tuple[int, list[int]]], seed: int
) -> None:
    totals = np.array([total for total, _ in family])
    sizes = np.concatenate([children for _, children in family])
    parent = np.repeat(np.arange(len(family)), [len(children) for _, children in family])
    mixed = np.random.default_rng(seed).permutation(len(sizes))
    shares = share(totals, sizes[mixed], parent[mixed])
    for number, (total, _) in enumerate(family):
        mine = parent[mixed] == number
        assert shares[mine].tolist() == one_at_a_time(total, sizes[mixed][mine].tolist())


@given(total=st.integers(0, 10**15), sizes=st.lists(st.integers(0, 10**9), min_size=1))
def test_shares_are_exact_and_differ_by_one_where_there_is_enough(
    total: int, sizes: list[int]
) -> None:
    shares = whole(total, sizes)
    assert sum(shares) == min(total, sum(sizes))
    assert all(0 <= got <= size for got, size in zip(shares, sizes, strict=True))
    open_ended = [got for got, size in zip(shares, sizes, strict=True) if got < size]
    if open_ended:
        assert max(shares) - min(open_ended) <= 1


@pytest.mark.parametrize(
    ("total", "sizes", "shares"),
    [
        (6, [10, 10, 10], [2, 2, 2]),
        (7, [10, 10, 10], [3, 2, 2]),  # equal ones: the first
        (8, [10, 11, 10], [3, 3, 2]),  # the largest, then the first
        (9, [1, 10, 10], [1, 4, 4]),
        (100, [1, 2, 3], [1, 2, 3]),
        (2, [1, 5, 9, 5], [0, 1, 1, 0]),
        (0, [3, 4], [0, 0]),
        (5, [0, 0], [0, 0]),
    ],
)
def test_a_table_of_shares(total: int, sizes: list[int], shares: list[int]) -> None:
    assert whole(total, sizes) == shares


def test_a_million_clusters_are_shared_in_seconds() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.zipf(1.5, 1_000_000).clip(max=10_000_000)
    parent = rng.integers(0, 10_000, len(sizes))
    totals = rng.integers(0, 100_000, 10_000)
    start = time.perf_counter()
    shares = share(totals, sizes, parent)
    assert time.perf_counter() - start < 10
    below = np.bincount(parent, weights=sizes, minlength=len(totals))
    np.testing.assert_array_equal(np.bincount(parent, weights=shares), np.minimum(totals, below))


def test_the_nearest_of_each_cluster() -> None:
    cluster = np.array([0, 1, 0, 0, 1, 0])
    cosine = np.array([0.5, 0.1, 0.9, 0.5, 0.2, 0.7], np.float32)
    assert nearest_of_each(cluster, cosine, 1).tolist() == [2, 4]
    assert nearest_of_each(cluster, cosine, 3).tolist() == [0, 1, 2, 4, 5]


def unit(rows: Floats) -> Floats:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def planted(rng: np.random.Generator, sizes: Ints) -> tuple[Floats, Ints]:
    """Rows of 3 concepts with 4 kinds each, `sizes` (12,) of them; and the kind of each row."""
    concepts = np.repeat(rng.standard_normal((3, 32)), 4, axis=0)
    kinds = unit(unit(concepts) + 0.5 * unit(rng.standard_normal((12, 32))))
    kind = np.repeat(np.arange(12), sizes)
    rows = kinds[kind] + 0.15 * unit(rng.standard_normal((len(kind), 32)))
    return unit(rows), kind


@pytest.mark.parametrize("seed", range(5))
def test_draws_from_an_unbalanced_hierarchy_are_far_more_even_than_uniform_ones(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = np.array([8000, 3000, 900, 300, 1500, 400, 200, 100, 120, 80, 60, 40])
    rows, kind = planted(rng, sizes)
    centroids = kmeans.fit(rows, 60, 20, rng).centroids
    cluster, _ = assign(rows, centroids)
    levels = grow(centroids, [12, 3], rng)
    images = sizes_of_levels(np.bincount(cluster, minlength=len(centroids)), levels)
    assert [len(level) for level in images] == [60, 12, 3]
    assert all(level.sum() == sizes.sum() for level in images)
    quotas = top_down(300, images, levels)
    assert all(quota.sum() == 300 for quota in quotas)
    assert quotas[-1].tolist() == whole(300, images[-1].tolist())
    for below, above, level in zip(quotas, quotas[1:], levels, strict=False):
        assert np.bincount(level.parent, below, minlength=len(above)).tolist() == above.tolist()
    drawn = np.zeros(12)
    for one, quota in enumerate(quotas[0]):
        drawn += np.bincount(rng.permutation(kind[cluster == one])[:quota], minlength=12)
    concepts, of_pool = drawn.reshape(3, 4).sum(1), sizes.reshape(3, 4).sum(1)
    assert evenness(of_pool) < 0.6
    assert evenness(concepts) > 0.95
    assert evenness(drawn) > evenness(sizes) + 0.2


def test_resampling_spreads_centroids_over_the_support() -> None:
    """On a quarter circle that is a hundred times denser at one end: how unlike are the gaps?"""
    plain, flat = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        angles = np.pi / 2 * np.log1p(99 * rng.random(6000)) / np.log(100)
        angles = np.pi / 2 - angles  # density falls exponentially from 0
        rows = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        for centroids, unlike in (
            (kmeans.fit(rows, 16, 20, rng).centroids, plain),
            (fit_flat(rows, 16, rng), flat),
        ):
            gaps = np.diff(np.sort(np.arctan2(centroids[:, 1], centroids[:, 0])))
            unlike.append(gaps.std() / gaps.mean())
    assert np.mean(flat) < 0.8 * np.mean(plain)


def test_levels_that_would_not_be_smaller_are_left_out() -> None:
    rng = np.random.default_rng(0)
    centroids = unit(rng.standard_normal((6, 8)))
    assert [len(level.centroids) for level in grow(centroids, [50, 6, 3, 3, 2], rng)] == [3, 2]
    assert grow(centroids, [], rng) == []
    assert top_down(4, [np.array([9, 1, 1])], [])[0].tolist() == [2, 1, 1]


def test_evenness() -> None:
    assert evenness(np.array([5, 5, 5])) == pytest.approx(1)
    assert evenness(np.array([5, 0, 0])) == 0
    assert evenness(np.array([5])) == 1
    assert 0 < evenness(np.array([9, 1])) < evenness(np.array([6, 4])) < 1
