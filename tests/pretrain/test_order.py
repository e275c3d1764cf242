"""Every epoch is a permutation, whatever the shards; the order depends on nothing but its seed."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.order import Order, augmentation_rng, shuffled
from pretrain.samples import Ints

shard_counts = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def order(counts: list[int], seed: int = 0, window: int = 64) -> Order:
    return Order(np.array(counts, np.int64), seed, window)


@settings(max_examples=150, deadline=None)
@given(shard_counts, st.integers(0, 2**63), st.integers(1, 2000), st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(
    counts: list[int], seed: int, window: int, epoch: int
) -> None:
    total = sum(counts)
    seen = order(counts, seed, window).samples(epoch * total, (epoch + 1) * total)
    assert np.array_equal(np.sort(seen), np.arange(total))


@settings(max_examples=100, deadline=None)
@given(shard_counts, st.integers(1, 300), st.lists(st.integers(0, 3000), min_size=2, max_size=6))
def test_any_way_to_ask_gives_the_same_order(
    counts: list[int], window: int, borders: list[int]
) -> None:
    borders = sorted(borders)
    whole = order(counts, 3, window).samples(borders[0], borders[-1])
    asked = order(counts, 3, window)
    parts = [asked.samples(start, stop) for start, stop in pairwise(borders)]
    assert np.array_equal(np.concatenate(parts), whole)
    backwards = [asked.samples(start, stop) for start, stop in reversed(list(pairwise(borders)))]
    assert np.array_equal(np.concatenate(backwards[::-1]), whole)


@pytest.mark.parametrize("window", [1, 30, 10**6])
def test_epochs_and_seeds_differ(window: int) -> None:
    counts = [10] * 20
    epochs = order(counts, 0, window).samples(0, 1000).reshape(5, 200)
    others = order(counts, 1, window).samples(0, 1000).reshape(5, 200)
    for first in range(5):
        assert (epochs[first] == others[first]).mean() < 0.1
        for second in range(first):
            assert (epochs[first] == epochs[second]).mean() < 0.1


def windows_of(seen: Ints, shard_of: Ints) -> int:
    """The most shards that are being read at a time: begun and not yet finished."""
    first = [np.flatnonzero(shard_of[seen] == shard).min() for shard in np.unique(shard_of)]
    last = [np.flatnonzero(shard_of[seen] == shard).max() for shard in np.unique(shard_of)]
    changes = np.zeros(len(seen) + 1, np.int64)
    np.add.at(changes, first, 1)
    np.add.at(changes, np.array(last) + 1, -1)
    return int(changes.cumsum().max())


def test_only_the_shards_of_a_window_are_read_at_a_time() -> None:
    shard_of = np.repeat(np.arange(50), 20)
    seen = order([20] * 50, 0, 100).samples(0, 1000)
    assert windows_of(seen, shard_of) <= 5
    assert windows_of(order([20] * 50, 0, 1000).samples(0, 1000), shard_of) == 50


def test_a_small_set_is_permuted_uniformly() -> None:
    """Each of 6 samples of 3 shards is as often at each of 6 places (chi-square, 25 degrees)."""
    found = order([1, 2, 3], 0, 100).samples(0, 6 * 12_000).reshape(-1, 6)
    table = np.array([[np.count_nonzero(found[:, p] == s) for s in range(6)] for p in range(6)])
    assert ((table - 2000.0) ** 2 / 2000).sum() < 52.6  # p = .001
    pairs = found[:, 0] * 6 + found[:, 1]
    together = np.bincount(pairs, minlength=36)[np.flatnonzero(~np.eye(6, dtype=bool).ravel())]
    assert ((together - 400.0) ** 2 / 400).sum() < 58.3  # 29 degrees, p = .001


def test_the_order_never_changes() -> None:
    """Runs that were saved by an earlier version go on with these numbers."""
    assert shuffled(7, 1, 2, count=8).tolist() == [5, 6, 4, 3, 1, 7, 0, 2]
    assert order([3, 4, 5], 9, 6).samples(20, 30).tolist() == [6, 5, 3, 4, 0, 11, 2, 8, 9, 7]
    assert order([3, 4, 5], 9, 6).replacement(20, 1) == 9


def test_opening_an_order_of_142_million_samples_is_cheap() -> None:
    counts = np.full(120_000, 1_184, np.int64)
    large = Order(counts, 0, 1 << 17)
    seen = large.samples(10**9, 10**9 + 3_072)
    assert len(np.unique(seen)) == 3_072
    assert len(np.unique(seen // 1_184)) <= 112
    assert 0 <= large.replacement(10**9, 3) < 142_080_000


def test_replacements_spread_over_the_epoch() -> None:
    asked = order([10] * 10)
    drawn = [asked.replacement(p, attempt) for p in range(500) for attempt in range(4)]
    counts = np.bincount(drawn, minlength=100)
    assert len(counts) == 100
    assert counts.min() > 4


def test_augmentation_depends_on_seed_and_position_alone() -> None:
    draws = {(s, p): augmentation_rng(s, p).random() for s in range(3) for p in (0, 1, 2**40)}
    assert len(set(draws.values())) == 9
    assert all(augmentation_rng(s, p).random() == value for (s, p), value in draws.items())
