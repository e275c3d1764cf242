"""Neighbours against brute force and against faiss."""

import faiss
import numpy as np
import pytest

from curation.algorithms.knn import NONE, Floats, Ints, Neighbours, SlabIndex, exact_block, recall


def unit(rows: int, dim: int, seed: int) -> Floats:
    values = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def brute(queries: Floats, base: Floats, numbers: Ints, k: int) -> list[list[int]]:
    """Sorted by falling cosine, ties by rising number, in fp64 and plain Python."""
    answers = []
    for query in queries.astype(np.float64):
        scored = sorted((-float(row @ query), int(n)) for row, n in zip(base, numbers, strict=True))
        answers.append([number for _, number in scored[:k]])
    return answers


@pytest.mark.parametrize(
    ("queries", "base", "k"), [(7, 50, 4), (3, 2, 5), (1, 1, 1), (2100, 30, 3)]
)
def test_an_exact_block_is_what_brute_force_finds(queries: int, base: int, k: int) -> None:
    left, right = unit(queries, 16, 1), unit(base, 16, 2)
    numbers = np.arange(base) * 10 + 5
    found = exact_block(left, right, numbers, k)
    for row, wanted in zip(found.number.tolist(), brute(left, right, numbers, k), strict=True):
        assert row[: len(wanted)] == wanted
        assert row[len(wanted) :] == [NONE] * (k - len(wanted))


def test_an_exact_block_agrees_with_faiss() -> None:
    left, right = unit(200, 64, 3), unit(5000, 64, 4)
    index = faiss.IndexFlatIP(64)
    index.add(right)
    cosine, number = index.search(left, 10)
    found = exact_block(left, right, np.arange(5000), 10)
    np.testing.assert_array_equal(found.number, number)
    np.testing.assert_allclose(found.cosine, cosine, atol=1e-5)


def test_merging_blocks_in_any_order_is_one_block() -> None:
    left, right = unit(40, 8, 5), unit(300, 8, 6)
    numbers = np.arange(300)
    whole = exact_block(left, right, numbers, 6)
    for order in ([0, 1, 2], [2, 0, 1]):
        merged = Neighbours.empty(40, 6)
        for third in order:
            rows = slice(third * 100, third * 100 + 100)
            merged = merged.merge(exact_block(left, right[rows], numbers[rows], 6))
        np.testing.assert_array_equal(merged.number, whole.number)


def test_equal_vectors_come_in_the_order_of_their_numbers() -> None:
    same = np.repeat(unit(1, 8, 0), 20, axis=0)
    found = exact_block(same[:1], same, np.arange(20)[::-1].copy(), 20)
    assert found.number[0].tolist() == list(range(20))


def test_an_empty_base_has_no_neighbours() -> None:
    found = exact_block(unit(3, 8, 0), np.empty((0, 8), np.float32), np.empty(0, np.int64), 2)
    assert (found.number == NONE).all()


def test_the_slab_index_reaches_its_target_and_knows_its_recall() -> None:
    base, queries = unit(20_000, 32, 7), unit(500, 32, 8)
    numbers = np.arange(20_000) + 1_000
    index = SlabIndex(base, numbers, seed=0)
    truth = exact_block(queries, base, numbers, 5)
    probes = index.tune(queries[::2], 5, target=0.97)
    found = index.search(queries, 5)
    measured = recall(found, truth)
    hits = sum(len(set(a) & set(b)) for a, b in zip(found.number, truth.number, strict=True))
    assert measured == pytest.approx(hits / truth.number.size, abs=1e-3)
    assert measured > 0.94
    assert 4 <= probes < index.cells


def test_recall_counts_misses() -> None:
    truth = Neighbours(np.array([[0.9, 0.8]], np.float32), np.array([[1, 2]]))
    half = Neighbours(np.array([[0.9, -np.inf]], np.float32), np.array([[1, NONE]]))
    assert recall(truth, truth) == 1.0
    assert recall(half, truth) == 0.5
