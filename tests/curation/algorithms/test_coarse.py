"""Coarse rows and their products against fp64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_knn import around, unit

from curation.algorithms.coarse import LOOKED_AT, Coarse, Scores
from curation.algorithms.products import Floats


def peaked(count: int, dim: int) -> Floats:
    """Unit rows, most of whose norm is one of their numbers, as some networks give them."""
    rows = unit(count, dim, 3)
    rows[:, dim // 2] += 2
    peaked: Floats = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return peaked


ROWS = {
    "random": unit(300, 48, 0),
    "near": around(3, 300, 48, 0.1, 1),
    "peaked": peaked(300, 48),
    "zeros": np.zeros((300, 48), np.float32),
    "one number": np.eye(300, 48, dtype=np.float32),
    "flat": np.full((300, 48), 48**-0.5, np.float32),
}


@pytest.mark.usefixtures("multiplied_in")
@pytest.mark.parametrize("left", ROWS)
@pytest.mark.parametrize("right", ROWS)
def test_all_that_reaches_a_floor_is_found(left: str, right: str) -> None:
    rows, columns, rng = ROWS[left][:50], ROWS[right], np.random.default_rng(0)
    held, met = Coarse.of(rows), Coarse.of(columns)
    truth = rows.astype(np.float64) @ columns.T.astype(np.float64)
    floors, others = (rng.uniform(-0.2, 1.1, size).astype("f4") for size in (50, 300))
    scores = Scores(held, met)
    at_row, at_column = scores.reaching(floors - scores.off, others - met.off(held))
    found = np.zeros_like(truth, np.bool_)
    found[at_row, at_column] = True
    assert len(at_row) == found.sum()
    assert found[(truth >= floors[:, None]) | (truth >= others)].all()
    near = (truth >= floors[:, None] - 2.1 * scores.off[:, None] - 1e-4) | (
        truth >= others - 2.1 * met.off(held) - 1e-4
    )
    assert near[found].all()


@pytest.mark.usefixtures("multiplied_in")
@pytest.mark.parametrize("count", [1, 4, 30])
@pytest.mark.parametrize("kind", ROWS)
def test_at_least_so_many_reach_what_top_gives(kind: str, count: int) -> None:
    rows, columns = ROWS[kind][:50], ROWS[kind]
    scores = Scores(Coarse.of(rows), Coarse.of(columns))
    least = -np.sort(-(rows @ columns.T), axis=1)[:, count - 1]
    assert (scores.top(count) <= least + scores.off).all()


@settings(deadline=None)
@given(seed=st.integers(0, 99), chosen=st.lists(st.integers(0, 299), min_size=1, max_size=70))
def test_chosen_rows_are_multiplied_as_all_are(seed: int, chosen: list[int]) -> None:
    rows, columns = Coarse.of(unit(300, 24, seed)), Coarse.of(unit(90, 24, seed + 1))
    at, floors = np.array(chosen), np.full(300, 0.1, np.float32)
    every, some = np.zeros((300, 90), np.bool_), np.zeros((len(at), 90), np.bool_)
    every[Scores(rows, columns).reaching(floors)] = True
    some[Scores(rows.chosen(at, "some"), columns).reaching(floors[: len(at)])] = True
    np.testing.assert_array_equal(some, every[at])


def test_rows_with_larger_numbers_than_were_looked_at_are_not_lost() -> None:
    rows = np.repeat(np.full((1, 64), 1 / 8, np.float32), 2 * LOOKED_AT, axis=0)
    rows[1::2] = np.eye(64, dtype=np.float32)[3]
    held = Coarse.of(rows)
    scores = Scores(held.chosen(np.array([1, 3]), "queries"), held)
    floors = np.full(2, 0.9, np.float32)
    at_row, at_column = scores.reaching(floors - scores.off)
    assert {1, 3, 5}.issubset(set(at_column[at_row == 0].tolist()))
