"""Limits from counts against sorting all rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.algorithms.hierarchy import nearest_of_each
from curation.algorithms.nearest import keys, limits
from curation.algorithms.products import Floats, Ints


def chosen(cluster: Ints, cosine: Floats, k: int, wanted: int, cuts: list[int]) -> Ints:
    blocks, start = [], 0
    for stop in [*cuts, len(cluster)]:
        blocks.append((cluster[start:stop].astype(np.int32), keys(cosine[start:stop], start)))
        start = stop
    limit = limits(lambda: blocks, k, wanted)
    return np.flatnonzero(np.concatenate([key <= limit[own] for own, key in blocks]))


@settings(deadline=None)
@given(
    seed=st.integers(0, 999),
    count=st.integers(1, 300),
    k=st.integers(1, 9),
    wanted=st.integers(1, 60),
    different=st.sampled_from([1, 2, 10, 100_000]),
)
def test_limits_choose_what_sorting_chooses(
    seed: int, count: int, k: int, wanted: int, different: int
) -> None:
    rng = np.random.default_rng(seed)
    cluster = rng.integers(0, k, count)
    cosine = rng.uniform(0.5, 1.001, different).astype(np.float32)[
        rng.integers(0, different, count)
    ]
    cuts = np.sort(rng.integers(0, count, 2)).tolist()
    found = chosen(cluster, cosine, k, wanted, cuts)
    np.testing.assert_array_equal(found, nearest_of_each(cluster, cosine, wanted))


@pytest.mark.parametrize("wanted", [1, 499, 500, 501, 999, 1000, 1001])
def test_of_equal_rows_the_first_are_taken(wanted: int) -> None:
    cluster = np.arange(2000) % 2
    cosine = np.full(2000, 0.75, np.float32)
    found = chosen(cluster, cosine, 3, wanted, [10, 700, 700])
    assert found.tolist() == [i for i in range(2000) if i // 2 < wanted]


def test_any_cosine_and_place_has_a_key_of_its_own() -> None:
    cosine = np.array([1.02, 1, 0.5, 0.25, 0, -1, -1.02], np.float32)
    key = keys(cosine, 60_000_000_000)
    assert (np.diff(key) > 0).all()
    assert key.min() > 0
    assert (np.diff(keys(np.repeat(cosine, 3), 0)) > 0).all()
