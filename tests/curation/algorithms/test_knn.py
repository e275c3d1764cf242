"""kNN join against brute force in fp64 and against faiss; the same bytes however it is done."""

from collections.abc import Iterable

import faiss
import numpy as np
import pytest
import torch

from curation.algorithms import coarse, crowds, knn, products, search
from curation.algorithms.best import Neighbours
from curation.algorithms.cells import Reach
from curation.algorithms.components import Components
from curation.algorithms.knn import RecallError, Rows, Search, exact, join, recall
from curation.algorithms.products import NONE, Floats, Ints


def unit(rows: int, dim: int, seed: int) -> Floats:
    values = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def around(centres: int, rows: int, dim: int, spread: float, seed: int) -> Floats:
    """Unit rows in groups, as embeddings lie."""
    rng = np.random.default_rng(seed)
    found = unit(centres, dim, 1000)[rng.integers(0, centres, rows)]
    found = found + spread * rng.standard_normal((rows, dim)).astype(np.float32)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


NEAR_EQUAL = around(1, 5000, 8, 1e-4, 0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterable[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(
    found: Neighbours,
    queries: Floats,
    base: Floats,
    numbers: Ints | None = None,
    min_score: float = -np.inf,
    itself: bool = False,
) -> None:
    """That these are the best of all, falling, none twice; scores right to fp32."""
    numbers = np.arange(len(base)) if numbers is None else numbers
    true = queries.astype(np.float64) @ base.astype(np.float64).T
    if itself:
        np.fill_diagonal(true, -9)
    place = {number: at for at, number in enumerate(numbers.tolist())}
    for row in range(len(queries)):
        got = [n for n in found.number[row].tolist() if n != NONE]
        assert (found.number[row, len(got) :] == NONE).all()
        assert len(set(got)) == len(got)
        ours = found.score[row, : len(got)]
        own = true[row, [place[n] for n in got]]
        np.testing.assert_allclose(ours, own, atol=1e-6)
        assert np.isneginf(found.score[row, len(got) :]).all()
        assert (np.diff(ours) <= 0).all()
        tied = np.flatnonzero(np.diff(ours) == 0)
        assert all(got[at] < got[at + 1] for at in tied)
        best = np.sort(true[row][true[row] > max(min_score, -2)])[::-1][: found.number.shape[1]]
        assert abs(len(best) - len(got)) <= (true[row][abs(true[row] - min_score) < 1e-6]).size
        both = min(len(best), len(got))
        np.testing.assert_allclose(own[:both], best[:both], atol=1e-6)


def both_ways(found: Neighbours) -> None:
    """A pair is in both lists, except where one is full of better ones; no row meets itself."""
    lists = [set(row.tolist()) - {NONE} for row in found.number]
    for row, others in enumerate(lists):
        assert row not in others
        for other, score in zip(found.number[row].tolist(), found.score[row], strict=True):
            if other == NONE or row in lists[other]:
                continue
            worst = (found.score[other, -1], -found.number[other, -1])
            assert found.number[other, -1] != NONE
            assert worst > (score, -row)


def bytes_of(found: Neighbours) -> bytes:
    return found.score.tobytes() + found.number.tobytes()


@pytest.mark.parametrize(
    ("queries", "base", "k"), [(7, 50, 4), (3, 2, 5), (1, 1, 1), (700, 30, 3), (100, 3000, 10)]
)
@pytest.mark.parametrize("min_score", [-np.inf, 0.2])
def test_a_join_of_a_small_base_is_brute_force(
    queries: int, base: int, k: int, min_score: float
) -> None:
    left, right = unit(queries, 16, 1), unit(base, 16, 2)
    joined = join(left, right, Search(k, min_score))
    check(joined.neighbours, left, right, min_score=min_score)
    assert joined.recall == 1.0
    assert joined.nprobe == joined.cells


@pytest.mark.parametrize(("rows", "k"), [(1, 3), (2, 3), (300, 5), (1500, 40)])
@pytest.mark.parametrize("min_score", [-np.inf, 0.5])
def test_a_self_join_of_a_small_base_is_brute_force(rows: int, k: int, min_score: float) -> None:
    base = unit(rows, 8, 3)
    found = join(base, base, Search(k, min_score, itself=True)).neighbours
    check(found, base, base, min_score=min_score, itself=True)
    both_ways(found)


def test_a_join_agrees_with_faiss() -> None:
    left, right = unit(200, 64, 3), unit(3000, 64, 4)
    index = faiss.IndexFlatIP(64)
    index.add(right)
    score, number = index.search(left, 10)
    found = join(left, right, Search(10)).neighbours
    np.testing.assert_array_equal(found.number, number)
    np.testing.assert_allclose(found.score, score, atol=1e-5)


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("min_score", [-np.inf, 0.6])
def test_a_join_by_cells_reaches_its_target(
    itself: bool, min_score: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "ROWS_PER_CELL", 20)
    base = around(200, 6000, 24, 0.12, 1)
    left = base if itself else around(200, 700, 24, 0.12, 2)
    what = Search(8, min_score, itself, target_recall=0.95)
    joined = join(left, base, what)
    truth = exact(Rows(left, np.arange(len(left))), [Rows(base, np.arange(6000))], what)
    check(truth, left, base, min_score=min_score, itself=itself)
    assert recall(joined.neighbours, truth) > 0.94
    assert joined.recall >= 0.95
    assert 1 <= joined.nprobe < joined.cells / 4
    if itself:
        both_ways(joined.neighbours)


@pytest.mark.parametrize("itself", [False, True])
def test_threads_blocks_and_chunks_give_the_same_bytes(
    itself: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "ROWS_PER_CELL", 20)
    base = np.concatenate([around(30, 1500, 16, 0.2, 1), NEAR_EQUAL[:300].repeat(2, axis=1)])
    base[200:250] = base[100:150]
    left = base if itself else around(30, 400, 16, 0.2, 2)
    what = Search(6, itself=itself, seed=3)
    whole = join(left, base, what)
    for threads, query_rows, base_rows, chunk in [(2, 512, 2048, 65536), (1, 50, 130, 400)]:
        torch.set_num_threads(threads)
        monkeypatch.setattr(search, "QUERY_ROWS", query_rows)
        monkeypatch.setattr(search, "BASE_ROWS", base_rows)
        monkeypatch.setattr(knn, "CHUNK_ROWS", chunk)
        other = join(left, base, what)
        assert bytes_of(other.neighbours) == bytes_of(whole.neighbours)
        assert (other.cells, other.nprobe) == (whole.cells, whole.nprobe)
    for name, layout in [("fortran", np.asfortranarray), ("fp64", np.float64)]:
        laid = layout(base)
        same = join(laid if itself else layout(left), laid, what)
        assert bytes_of(same.neighbours) == bytes_of(whole.neighbours), name


@pytest.mark.parametrize("itself", [False, True])
def test_products_of_bytes_find_what_fp32_finds(
    itself: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "ROWS_PER_CELL", 30)
    base = np.concatenate([around(20, 900, 24, 0.1, 1), around(1, 300, 24, 1e-3, 2)])
    left = base if itself else around(20, 150, 24, 0.1, 3)
    monkeypatch.setattr(search, "BASE_ROWS", 20)  # most meet rows whose heaps are full
    found = []
    for module in (None, coarse, products):
        if module:
            monkeypatch.setattr(module, "multiplies_bytes", lambda: False)
        found.append(bytes_of(join(left, base, Search(7, itself=itself)).neighbours))
    assert found[0] == found[1] == found[2]


def test_equal_vectors_come_in_the_order_of_their_numbers() -> None:
    base = np.repeat(unit(1, 8, 0), 5000, axis=0)
    found = join(base[:50], base, Search(20)).neighbours
    assert (found.number == np.arange(20)).all()


def test_of_equal_rows_the_first_is_compared_and_is_the_neighbour_of_the_others() -> None:
    one = unit(5, 8, 0)
    base = one[[0, 1, 0, 2, 1, 0, 3, 4]]
    found = join(base, base, Search(9, itself=True)).neighbours
    firsts = Neighbours(found.score[[0, 1, 3, 6, 7]], found.number[[0, 1, 3, 6, 7]])
    assert {0, 1, 3, 6, 7}.issuperset(set(firsts.number.ravel().tolist()) - {NONE})
    for copy, first in ((2, 0), (4, 1), (5, 0)):
        assert found.number[copy].tolist() == [first] + [NONE] * 8
        assert found.score[copy, 0] == pytest.approx(1)
    whole = join(np.repeat(one[:1], 5000, axis=0), np.repeat(one[:1], 5000, axis=0), what_itself(3))
    assert (whole.neighbours.number[1:, 0] == 0).all()
    assert (whole.neighbours.number[0] == NONE).all()


def what_itself(k: int, min_score: float = -np.inf) -> Search:
    return Search(k, min_score, itself=True)


def test_near_equal_vectors_are_still_told_apart() -> None:
    found = join(NEAR_EQUAL[:40], NEAR_EQUAL, Search(5)).neighbours
    check(found, NEAR_EQUAL[:40], NEAR_EQUAL)
    mine = NEAR_EQUAL[:1500]
    found = join(mine, mine, what_itself(5, 0.9)).neighbours
    both_ways(found)
    assert (found.number != NONE).all()


def test_a_crowd_is_joined_through_few_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies apart has its true neighbours, and the crowd is one component."""
    monkeypatch.setattr(knn, "ROWS_PER_CELL", 20)
    monkeypatch.setattr(crowds, "CROWD", 10)
    apart, crowd = around(40, 3000, 16, 0.1, 0), around(1, 3000, 16, 0.01, 9)
    base = np.concatenate([apart, crowd])[np.random.default_rng(0).permutation(6000)]
    is_crowd = (base @ crowd[0]) > 0.99
    what = Search(8, 0.7, itself=True, target_recall=0.95)
    found = join(base, base, what)
    truth = exact(Rows(base, np.arange(6000)), [Rows(base, np.arange(6000))], what)
    lone = ~is_crowd
    ours, true = (Neighbours(n.score[lone], n.number[lone]) for n in (found.neighbours, truth))
    assert recall(ours, true) > 0.94
    row, column = np.nonzero((found.neighbours.number != NONE) & is_crowd[:, None])
    edges = Components(6000)
    edges.add(row, found.neighbours.number[row, column])
    assert len(np.unique(edges.labels()[is_crowd])) == 1
    assert len(np.unique(found.neighbours.number[row, column])) < is_crowd.sum() / 2


def test_one_giant_cluster_among_others() -> None:
    base = np.concatenate([around(1, 4500, 16, 0.02, 0), unit(500, 16, 9)])
    found = join(base[::50], base, Search(5, target_recall=0.9))
    check_share(found.neighbours, base[::50], base, 0.89)


def check_share(found: Neighbours, queries: Floats, base: Floats, share: float) -> None:
    true = np.sort(queries.astype(np.float64) @ base.T.astype(np.float64), axis=1)[:, ::-1]
    hits = found.score >= true[:, found.number.shape[1] - 1, None] - 1e-6
    assert hits.mean() > share


@pytest.mark.parametrize("zeros", [1, 300, 2000])
def test_zero_rows_have_neighbours_of_score_zero(
    zeros: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "ROWS_PER_CELL", 20)
    base = np.concatenate([np.zeros((zeros, 8), np.float32), around(40, 2000 - zeros, 8, 0.05, 0)])
    found = join(base, base, what_itself(4)).neighbours
    assert (found.score[1:zeros, 0] == 0).all()
    near = join(base, base, what_itself(4, 0.5)).neighbours
    assert (near.number[:zeros] == NONE).all()
    both_ways(near)
    rest = join(base[zeros - 1 :], base, Search(4)).neighbours
    assert np.isfinite(rest.score[1:]).all()
    asking = np.concatenate([np.zeros((zeros, 8), np.float32), around(40, 300, 8, 0.05, 1)])
    dense = around(40, 2000, 8, 0.05, 0)
    alone = join(asking[zeros:], dense, Search(4)).neighbours
    among_zeros = join(asking, dense, Search(4)).neighbours  # as if no zero asked
    np.testing.assert_array_equal(among_zeros.number[zeros:], alone.number)


def test_nothing_to_ask_or_to_answer() -> None:
    rows, none = unit(5, 8, 0), np.empty((0, 8), np.float32)
    assert (join(rows, none, Search(3)).neighbours.number == np.full((5, 3), NONE)).all()
    assert join(none, rows, Search(3)).neighbours.number.shape == (0, 3)
    assert join(none, none, what_itself(3)).neighbours.number.shape == (0, 3)
    assert (join(rows[:1], rows[:1], what_itself(2)).neighbours.number == NONE).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_named(bad: float) -> None:
    rows = unit(9, 8, 0)
    broken = rows.copy()
    broken[[2, 5], 3] = bad
    for left, right in ((broken, rows), (rows, broken)):
        with pytest.raises(ValueError, match=r"2 of 9 vectors are not finite \(rows 2, 5\)"):
            join(left, right, Search(3))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        Search(0)


@pytest.mark.parametrize("itself", [False, True])
def test_a_recall_that_cannot_be_reached_is_an_error(
    itself: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random rows of many dimensions have their neighbours in all cells."""
    monkeypatch.setattr(knn, "ROWS_PER_CELL", 20)
    monkeypatch.setattr(knn, "LONGEST_WAY", 6)
    base = unit(2000, 64, 0)
    with pytest.raises(RecallError, match=r"recall 0.99 needs more than 6 of \d+ cells"):
        join(base if itself else unit(300, 64, 1), base, Search(10, itself=itself))
    monkeypatch.setattr(knn, "choose_reach", lambda *_: Reach(-np.inf, 3))
    with pytest.raises(RecallError, match=r"recall 0\.\d{4} on a sample, below 0.99"):
        join(base if itself else unit(300, 64, 1), base, Search(10, itself=itself))


def test_recall_counts_misses_and_takes_ties() -> None:
    truth = Neighbours(np.array([[0.9, 0.8]], np.float32), np.array([[1, 2]]))
    half = Neighbours(np.array([[0.9, -np.inf]], np.float32), np.array([[1, NONE]]))
    tied = Neighbours(np.array([[0.9, 0.8]], np.float32), np.array([[1, 3]]))
    nothing = Neighbours(np.full((1, 2), -np.inf, np.float32), np.full((1, 2), NONE))
    assert recall(truth, truth) == 1.0
    assert recall(half, truth) == 0.5
    assert recall(tied, truth) == 1.0
    assert recall(nothing, truth) == 0.0
    assert recall(half, nothing) == 1.0
    assert recall(half, truth, alike=0.7) == 1.0  # in a crowd one stands for all
    assert recall(half, truth, alike=0.85) == 0.5


def test_a_true_neighbour_that_k_others_beat_is_not_missed() -> None:
    truth = Neighbours(np.array([[0.7], [0.7]], np.float32), np.array([[5], [5]]))
    found = Neighbours(
        np.array([[0.9, 0.8], [0.9, -np.inf]], np.float32), np.array([[1, 2], [1, NONE]])
    )
    assert recall(found, truth) == 0.5


def test_a_part_of_the_base_tells_the_recall_of_pairs_above_a_score() -> None:
    rows = around(3000, 40_000, 24, 0.13, 0)
    what = Search(16, 0.8, itself=True, target_recall=0.95)
    joined = join(rows, rows, what)
    asked = np.arange(0, len(rows), 20)
    product = rows[asked] @ rows.T
    product[np.arange(len(asked)), asked] = -1
    number = np.argsort(-product, axis=1)[:, :16]
    score = np.take_along_axis(product, number, axis=1)
    truth = Neighbours(score, np.where(score > 0.8, number, NONE))
    ours = Neighbours(joined.neighbours.score[asked], joined.neighbours.number[asked])
    assert (truth.number != NONE).sum() > 2000
    assert joined.nprobe < joined.cells / 4
    assert 0.95 <= joined.recall < 1
    assert recall(ours, truth) == pytest.approx(joined.recall, abs=0.01)


def test_rare_copies_are_found_though_the_sample_has_none() -> None:
    rows = unit(30_000, 64, 0)
    copies = rows[:20] + 0.1 * np.random.default_rng(1).standard_normal((20, 64), np.float32)
    rows[-20:] = copies / np.linalg.norm(copies, axis=1, keepdims=True)
    found = join(rows, rows, Search(4, 0.7, itself=True)).neighbours.number
    met = (found[:20] == (30_000 - 20 + np.arange(20))[:, None]).any(axis=1)
    assert met.mean() > 0.8  # .75 in the two nearest cells alone


def test_the_reach_is_the_least_that_meets_enough_pairs() -> None:
    rows = around(300, 9000, 32, 0.35, 0)
    cells = knn.fit_cells(rows, len(rows), np.random.default_rng(0))
    sample = np.arange(0, 9000, 10)
    truth = exact(Rows(rows[sample], sample), [Rows(rows, np.arange(9000))], Search(4, itself=True))
    pairs = knn.Pairs.of(truth.number, rows, cells)
    back = cells.assign(rows[sample])[pairs.query]

    def share(reach: Reach) -> float:
        there = (cells.way(rows[sample], reach)[pairs.query] == pairs.cell[:, None]).any(axis=1)
        here = (cells.way(pairs.rows, reach) == back[:, None]).any(axis=1)
        return float((there | here).mean())

    for target in (0.9, 0.97):
        reach = knn.choose_reach(
            cells, rows[sample], pairs, Search(4, itself=True, target_recall=target)
        )
        assert target <= share(reach) < target + 0.03
        assert share(Reach(reach.margin - 0.05, reach.most)) < target
