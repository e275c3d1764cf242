"""Search in cells against brute force in fp64."""

import numpy as np
import pytest
from test_knn import check, unit

from curation.algorithms import search
from curation.algorithms.best import Best, Neighbours
from curation.algorithms.products import NONE
from curation.algorithms.visits import Base, Rows, Twins, Visits


@pytest.mark.usefixtures("multiplied_in")
@pytest.mark.parametrize("blocks", [(512, 2048), (1, 3), (7, 64)])
def test_queries_meet_every_row_of_the_cells_that_they_visit(
    blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "QUERY_ROWS", blocks[0])
    monkeypatch.setattr(search, "BASE_ROWS", blocks[1])
    rng = np.random.default_rng(0)
    rows, asking = unit(400, 16, 1), unit(60, 16, 2)
    cell = rng.integers(0, 9, 400)
    cell[cell == 4] = 5  # an empty cell
    visited = np.stack([rng.choice(9, 3, replace=False) for _ in asking])
    visited[0] = [2, NONE, NONE]
    visited[1] = NONE
    best = Best(60, 8)
    base = Base.of(Rows(rows, np.arange(400) * 3), cell, 9)
    search.search(Rows(asking, np.empty(0, np.int64)), Visits.of(visited, 9), base, best)
    found = best.sorted()
    for query in range(60):
        met = np.flatnonzero(np.isin(cell, visited[query]))
        one = Neighbours(found.score[query : query + 1], found.number[query : query + 1])
        check(one, asking[query : query + 1], rows[met], met * 3)


def test_a_pair_counts_for_both_when_one_visits_the_other() -> None:
    rows = unit(50, 8, 0)
    base = Base.of(Rows(rows, np.arange(100, 150)), np.repeat([0, 1], 25), 2)
    visits = Visits.of(np.repeat([[1]], 50, axis=0), 2)  # all visit the second half only
    best = Best(50, 49)
    search.search(base.rows, visits, base, best, Twins(best, np.arange(50)))
    found = best.sorted()
    for row in range(50):
        numbers = found.number[row][found.number[row] != NONE].tolist()
        others = range(100, 150) if row >= 25 else range(125, 150)
        assert sorted(numbers) == [n for n in others if n != row + 100]


def test_visits_list_the_queries_of_each_cell_in_their_order() -> None:
    cells = np.random.default_rng(0).integers(-1, 7, (30, 4)).astype(np.int32)
    visits = Visits.of(cells, 9)
    assert visits.starts.shape == (10,)
    for cell in range(9):
        asking = visits.queries[visits.starts[cell] : visits.starts[cell + 1]]
        np.testing.assert_array_equal(asking, np.nonzero(cells == cell)[0])


def test_rows_in_no_cell_are_not_met() -> None:
    rows = unit(40, 8, 0)
    base = Base.of(Rows(rows, np.arange(40)), np.where(np.arange(40) % 2, -1, 0), 1)
    best = Best(40, 40)
    visits = Visits.of(np.zeros((40, 1), np.int32), 1)
    search.search(Rows(rows, np.empty(0, np.int64)), visits, base, best)
    assert set(best.sorted().number.ravel().tolist()) == {NONE, *range(0, 40, 2)}


def test_joined_visits_are_those_of_all_parts() -> None:
    rng = np.random.default_rng(0)
    cells = rng.integers(-1, 9, (200, 3)).astype(np.int32)
    parts = []
    for start, stop in ((0, 70), (70, 71), (71, 71), (71, 200)):
        some = Visits.of(cells[start:stop], 9)
        parts.append(Visits(some.queries + start, some.starts))
    joined, whole = Visits.joined(parts), Visits.of(cells, 9)
    np.testing.assert_array_equal(joined.starts, whole.starts)
    np.testing.assert_array_equal(joined.queries, whole.queries)
