"""Products, and what is asked of them."""

import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_knn import unit

from curation.algorithms import tiles
from curation.algorithms.products import Products, reached

FLOATS = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}  # what scores can be off


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [20, 300, 1500])
@pytest.mark.parametrize("count", [1, 9, 20, 200, 9999])
@pytest.mark.parametrize("biased", [False, True])
def test_top_are_the_largest(dtype: torch.dtype, count: int, columns: int, biased: bool) -> None:
    rows, fixed = unit(70, 24, 0), unit(columns, 24, 1)
    bias = np.linspace(-1, 1, columns, dtype="f4") * biased
    found, off = Products(fixed, bias, dtype), FLOATS[dtype]
    score, column = found.top(rows, count)
    truth = rows @ fixed.T + bias
    np.testing.assert_allclose(score, -np.sort(-truth, axis=1)[:, :count], atol=off, rtol=0)
    np.testing.assert_allclose(np.take_along_axis(truth, column, 1), score, atol=off)
    assert (np.diff(score, axis=1) <= 0).all()
    assert np.abs(found.scores(rows) - truth).max() <= off


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [31, 32, 127, 333, 1024, 1025, 1500])
def test_all_that_reaches_a_floor_is_found_in_wide_blocks(dtype: torch.dtype, columns: int) -> None:
    rows, fixed, rng = unit(50, 24, 0), unit(columns, 24, 1), np.random.default_rng(2)
    floors, off = rng.uniform(-0.2, 0.9, 50).astype("f4"), np.float32(FLOATS[dtype])
    truth = rows @ fixed.T
    at_row, at_column = Products(fixed, None, dtype).reaching(rows, floors - off)
    found = np.zeros_like(truth, np.bool_)
    found[at_row, at_column] = True
    assert len(at_row) == found.sum()
    assert found[truth >= floors[:, None]].all()
    assert (truth >= floors[:, None] - 2 * off)[found].all()


@settings(deadline=None)  # the first call compiles
@given(rows=st.integers(1, 5), columns=st.integers(1, 100), seed=st.integers(0, 99))
def test_what_reaches_a_floor_of_its_row_or_column_is_found(
    rows: int, columns: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    scores, floors, others = (
        rng.integers(-5, 6, shape).astype(np.int32)
        for shape in ((rows, columns), (rows,), (columns,))
    )
    floors[0], others[0] = -(2**31), 2**31 - 1
    by_row = scores >= floors[:, None]
    nothing = np.empty(0, np.int32)
    for wanted, of_columns in ((by_row, nothing), (by_row | (scores >= others), others)):
        at_row, at_column = reached(scores, columns, floors, of_columns)
        pairs = list(zip(at_row.tolist(), at_column.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        assert set(pairs) == set(zip(*(s.tolist() for s in np.nonzero(wanted)), strict=True))


def _doubled(numbers: list[int]) -> list[int]:
    found = [0] * len(numbers)

    def double(place: int) -> None:
        found[place] = 2 * numbers[place]

    tiles.each(len(numbers), double)
    return found


def test_a_forked_child_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert _doubled([1, 2, 3]) == [2, 4, 6]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_doubled, ([4, 5, 6],)).get(timeout=60) == [8, 10, 12]
