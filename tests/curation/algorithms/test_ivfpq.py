"""IVF-PQ with exact re-scoring against brute force."""

from collections.abc import Iterable

import faiss
import numpy as np
import pytest
import torch
from test_knn import around, bytes_of, check, check_share, unit

from curation.algorithms import ivfpq
from curation.algorithms.ivfpq import IvfPq
from curation.algorithms.knn import RecallError
from curation.algorithms.products import NONE, Floats


@pytest.fixture(autouse=True)
def one_thread() -> Iterable[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dim", [32, 30, 7])
def test_a_slab_is_searched_to_the_target_recall(dim: int) -> None:
    base, queries = around(150, 8000, dim, 0.1, 0), around(150, 400, dim, 0.1, 1)
    numbers = np.arange(8000) * 3 + 5
    index = IvfPq(base[::2], lists=64, target_recall=0.95)
    assert index.lists == 64
    slab = index.over(base, numbers, queries[::2], 5)
    found = slab.search(queries)
    check_share(found, queries, base, 0.94)
    own = np.einsum("nkd,nd->nk", base[(found.number - 5) // 3].astype(np.float64), queries)
    np.testing.assert_allclose(found.score, own, atol=1e-6)
    assert all(len(set(row)) == 5 for row in found.number.tolist())
    assert (np.diff(found.score) <= 0).all()
    assert slab.nprobe < 64
    assert 1 < slab.factor < 256


@pytest.mark.parametrize("slab", [0, 1, 4, 600])
def test_small_slabs_and_small_samples_are_searched_exactly(slab: int) -> None:
    base, queries = unit(slab, 12, 0), unit(30, 12, 1)
    for sample in (unit(2000, 12, 2), unit(600, 12, 2), unit(1, 12, 2), np.zeros((900, 12))):
        index = IvfPq(sample, lists=8)
        assert index.lists == (8 if len(sample) == 2000 else 0)
        check(
            index.search(base, np.arange(slab) + 7, queries, 5), queries, base, np.arange(slab) + 7
        )
    assert IvfPq(unit(2000, 12, 2), lists=1000).lists == 2000 // 39


def test_slabs_may_be_equal_rows_zeros_or_elsewhere() -> None:
    index = IvfPq(around(50, 3000, 16, 0.1, 0), lists=16)
    one, queries = unit(1, 16, 5), unit(20, 16, 6)
    equal = index.search(np.repeat(one, 5000, axis=0), np.arange(5000), queries, 3)
    np.testing.assert_allclose(equal.score, np.repeat(queries @ one.T, 3, axis=1), atol=1e-6)
    zeros = index.search(np.zeros((700, 16), np.float32), np.arange(700), queries, 3)
    assert (zeros.score == 0).all()
    far = unit(1000, 16, 9)
    check_share(index.search(far, np.arange(1000), queries, 3), queries, far, 0.98)
    asked = np.concatenate([np.zeros((5, 16), np.float32), queries])
    found = index.search(far, np.arange(1000), asked, 3)
    assert (found.number != NONE).all()
    assert (found.number[:5] == [0, 1, 2]).all()
    none = index.search(far, np.arange(1000), queries[:0], 3)
    assert none.number.shape == (0, 3)
    many = index.search(far, np.arange(1000), queries, 1200)
    assert ((many.number != NONE).sum(axis=1) == 1000).all()


def run(base: Floats, queries: Floats) -> bytes:
    index = IvfPq(base[::2], lists=40, target_recall=0.9)
    return bytes_of(index.search(base, np.arange(len(base)), queries, 4))


def test_threads_give_the_same_bytes_and_faiss_keeps_its_own() -> None:
    base, queries = around(100, 5000, 24, 0.15, 0), around(100, 900, 24, 0.15, 1)
    whole = run(base, queries)
    torch.set_num_threads(2)
    before = faiss.omp_get_max_threads()
    assert run(base, queries) == whole
    assert faiss.omp_get_max_threads() == before
    assert torch.get_num_threads() == 2


def test_a_recall_that_cannot_be_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ivfpq, "FACTORS", (1,))
    base = unit(3000, 64, 0)
    with pytest.raises(RecallError, match=r"recall 0\.\d{4} on a sample with all 20 lists and 1 "):
        IvfPq(base, lists=20).search(base, np.arange(3000), unit(50, 64, 1), 10)


def test_rows_that_are_not_finite_are_named() -> None:
    rows, index = unit(700, 8, 0), IvfPq(unit(700, 8, 1), lists=4)
    broken = rows.copy()
    broken[3, 0] = np.nan
    with pytest.raises(ValueError, match=r"not finite \(rows 3\)"):
        IvfPq(broken)
    for left, right in ((broken, rows), (rows, broken)):
        with pytest.raises(ValueError, match=r"not finite \(rows 3\)"):
            index.search(left, np.arange(700), right, 3)
    with pytest.raises(ValueError, match="k must be at least 1"):
        index.search(rows, np.arange(700), rows, 0)
