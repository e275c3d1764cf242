"""Products on the processor and by the code for a GPU (here on the processor's own device)."""

import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_knn import around, unit

from curation.algorithms import assign as assigning
from curation.algorithms import products
from curation.algorithms.kmeans import fit
from curation.algorithms.knn import Search, join
from curation.algorithms.products import Floats, Products

FLOATS = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2}


def on(device: torch.device | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (products, assigning):
        monkeypatch.setattr(module, "fast_device", lambda: device)


@pytest.fixture(params=[None, torch.device("cpu")], ids=["numba", "device"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device | None:
    on(request.param, monkeypatch)
    return request.param


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 9, 200, 999])
def test_top_are_the_largest(device: torch.device | None, dtype: torch.dtype, count: int) -> None:
    rows, columns, bias = unit(70, 24, 0), unit(300, 24, 1), np.linspace(-1, 1, 300, dtype="f4")
    found = Products(columns, bias, dtype)
    score, column = found.top(rows, count)
    truth = rows @ columns.T + bias
    np.testing.assert_allclose(score, -np.sort(-truth, axis=1)[:, :count], atol=found.slack, rtol=0)
    np.testing.assert_allclose(np.take_along_axis(truth, column, 1), score, atol=found.slack)
    assert (np.diff(score, axis=1) <= 0).all()
    assert np.abs(found.scores(rows) - truth).max() <= found.slack


@settings(deadline=None)  # the first call compiles
@given(
    rows=st.integers(1, 5), columns=st.integers(1, 100), seed=st.integers(0, 99), gpu=st.booleans()
)
def test_what_reaches_a_floor_of_its_row_or_column_is_found(
    rows: int, columns: int, seed: int, gpu: bool
) -> None:
    rng = np.random.default_rng(seed)
    scores, floors, other = (
        rng.integers(-5, 6, shape).astype(np.float32)
        for shape in ((rows, columns), (rows,), (columns,))
    )
    floors[0], other[0] = -np.inf, np.inf
    by_row = scores >= floors[:, None]
    nothing: Floats = np.empty(0, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        on(torch.device("cpu") if gpu else None, patch)
        found = Products(np.eye(columns, dtype=np.float32), None, torch.float32)
        for wanted, others in ((by_row, nothing), (by_row | (scores >= other), other)):
            at_row, at_column = found.reaching(scores, floors, others)
            pairs = list(zip(at_row.tolist(), at_column.tolist(), strict=True))
            assert len(set(pairs)) == len(pairs)
            assert set(pairs) == set(zip(*(s.tolist() for s in np.nonzero(wanted)), strict=True))


def test_a_gpu_gives_the_same_centroids_and_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, found = around(60, 6000, 24, 0.1, 0), []
    for device in (None, torch.device("cpu")):
        on(device, monkeypatch)
        neighbours = join(rows, rows, Search(8, itself=True)).neighbours
        fitted = fit(rows, 40, 6, np.random.default_rng(0))
        found.append((fitted.centroids.tobytes(), neighbours.score.tobytes()))
    assert found[0] == found[1]


def _doubled(numbers: list[int]) -> list[int]:
    found = [0] * len(numbers)

    def double(place: int) -> None:
        found[place] = 2 * numbers[place]

    products.each(len(numbers), double)
    return found


def test_a_forked_child_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert _doubled([1, 2, 3]) == [2, 4, 6]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_doubled, ([4, 5, 6],)).get(timeout=60) == [8, 10, 12]
