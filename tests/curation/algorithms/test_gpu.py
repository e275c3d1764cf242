"""The code for a GPU, on a GPU if there is one, else on torch's device for the processor."""

import numpy as np
import pytest
import torch
from test_knn import around, unit

from curation.algorithms import gpu, gpu_assign, gpu_search
from curation.algorithms.assign import Assigner, assigner
from curation.algorithms.best import Best
from curation.algorithms.gpu_assign import GpuAssigner
from curation.algorithms.groups import Groups
from curation.algorithms.kmeans import DEFAULT, Options, fit
from curation.algorithms.knn import Search, join
from curation.algorithms.lloyd import Metric, Totals
from curation.algorithms.products import NONE
from curation.algorithms.ranking import Ranking
from curation.algorithms.scans import Within
from curation.algorithms.search import search
from curation.algorithms.visits import Base, Rows, Twins, Visits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "device", lambda: DEVICE)
    monkeypatch.setattr(gpu, "free_bytes", lambda: 1 << 30)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Patches that a test sets anew: first the processor, then a GPU."""
    monkeypatch.setattr(gpu, "free_bytes", lambda: 1 << 30)
    return monkeypatch


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(("columns", "count"), [(20, 3), (300, 7), (300, 200), (1500, 1), (9, 99)])
def test_the_nearest_are_those_of_the_processor(columns: int, count: int) -> None:
    rows, fixed = unit(70, 24, 0), unit(columns, 24, 1)
    fixed[columns // 2 :] = fixed[: -(columns // 2)]  # each twice
    score, column = gpu.Columns(fixed).nearest(rows, count)
    same_score, same_column = Ranking(fixed).nearest(rows, count)
    np.testing.assert_array_equal(score, same_score)
    np.testing.assert_array_equal(column, same_column)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("margin", [-0.1, 0.0, 0.2, np.inf])
@pytest.mark.parametrize("falling", [0.0, 0.02])
@pytest.mark.parametrize("scale", [1.0, 0.5, 127.4 / 128])
def test_near_are_those_of_the_processor(margin: float, falling: float, scale: float) -> None:
    rows, fixed = unit(70, 24, 0), unit(300, 24, 1)
    rows[:9] = np.eye(9, 24, dtype=np.float32) * np.float32(scale)
    rows[9] = 0
    within = Within(0.85, (margin - falling * np.arange(40)).astype(np.float32), 3)
    found, same = gpu.Columns(fixed).near(rows, within), Ranking(fixed).near(rows, within)
    most = found.shape[1]
    np.testing.assert_array_equal(found, same[:, :most])
    assert (same[:, most:] == NONE).all()


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 300.0, 1e6])
@pytest.mark.parametrize("held", [True, False])
def test_rows_go_to_the_same_centroids_as_on_the_processor(
    spherical: bool, scale: float, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "free_bytes", lambda: (1 << 30) * held)
    monkeypatch.setattr(gpu, "SCORES", 5000)  # several tiles
    monkeypatch.setattr(gpu_assign, "MOVED_ROWS", 300)
    scale = 1.0 if spherical else scale
    rows, centroids = unit(1000, 24, 0) * np.float32(scale), unit(40, 24, 1) * np.float32(scale)
    if not spherical:
        rows[::7] *= np.float32(1e-4)
    centroids[30:] = centroids[5]  # they get no rows
    centroids[7] = centroids[6] * np.float32(1 + 2**-22)  # ties but for the last bits
    ours, theirs, metric = GpuAssigner(spherical), Assigner(spherical), Metric()
    if not spherical:
        metric = Metric.plain(float(np.linalg.norm(rows, axis=1).max()))
    totals, wanted = Totals.empty(*centroids.shape), Totals.empty(*centroids.shape)
    for shift in (0.0, 0.1, 0.0):
        moved = centroids + np.float32(shift * scale) * unit(40, 24, 2)
        moved[30:] = moved[5]
        totals.merge(ours.totals(rows, moved, metric))
        cluster = theirs(rows, moved)
        np.testing.assert_array_equal(GpuAssigner(spherical)(rows, moved), cluster)
        wanted = Totals.empty(*centroids.shape)
        wanted.move(rows, np.full(len(rows), NONE), cluster, metric)
        np.testing.assert_array_equal(totals.sums, wanted.sums)
        np.testing.assert_array_equal(totals.counts, wanted.counts)


@pytest.mark.parametrize("options", [DEFAULT, Options(spherical=False), Options(start="k-means++")])
def test_centroids_are_the_same_to_the_bit(options: Options, both: pytest.MonkeyPatch) -> None:
    rows, found = around(60, 6000, 24, 0.1, 0), []
    for device in (None, DEVICE):
        both.setattr(gpu, "device", lambda device=device: device)
        assert isinstance(assigner(), GpuAssigner if device else Assigner)
        fitted = fit(rows, 40, 6, np.random.default_rng(0), options)
        found.append((fitted.centroids.tobytes(), fitted.objective))
    assert found[0] == found[1]


@pytest.mark.parametrize("k", [1, 8, 64])
@pytest.mark.parametrize("min_score", [-np.inf, 0.6])
def test_a_join_finds_the_same(k: int, min_score: float, both: pytest.MonkeyPatch) -> None:
    both.setattr(gpu_search, "PENDING", 10_000)
    both.setattr(gpu, "PAIRS", 4096)
    rows, found = around(60, 6000, 24, 0.1, 0), []
    rows[17] = 0
    rows[100:400] = rows[100]
    for device in (None, DEVICE):
        both.setattr(gpu, "device", lambda device=device: device)
        itself = join(rows, rows, Search(k, min_score, itself=True))
        other = join(rows[:500], rows[500:], Search(k, min_score))
        found.append((itself, other))
    for ours, theirs in zip(*found, strict=True):
        assert ours.nprobe == theirs.nprobe
        assert ours.recall == theirs.recall
        np.testing.assert_allclose(ours.neighbours.score, theirs.neighbours.score, atol=1e-6)
        assert (ours.neighbours.number == theirs.neighbours.number).mean() > 0.9995


@pytest.mark.usefixtures("on_gpu")
def test_what_was_found_before_counts_and_both_rows_of_a_pair_get_it() -> None:
    rows = unit(300, 24, 0)
    numbers = np.arange(300) * 3
    base, asked = Rows(rows, numbers), Rows(rows[:40], numbers[:40])
    best, twin = Best(40, 6), Best(300, 6, 0.1)
    truth = rows.astype(np.float64) @ rows.T.astype(np.float64)
    np.fill_diagonal(truth, -2)
    for first in (0, 150):  # one cell at a time
        cell = np.full(300, NONE)
        cell[first : first + 150] = 0
        visits = Visits.of(np.zeros((40, 1), np.int64), 1)
        search(asked, visits, Base.of(base, cell, 1), best, Twins(twin, np.arange(300)))
    found = best.sorted()
    np.testing.assert_array_equal(found.number, 3 * np.argsort(-truth[:40], axis=1)[:, :6])
    back, scores = twin.sorted(), truth[:, :40]
    order = np.argsort(-scores, axis=1)[:, :6]
    above = np.take_along_axis(scores, order, axis=1) > 0.1
    np.testing.assert_array_equal(back.number, np.where(above, 3 * order, NONE))


@pytest.mark.parametrize("scores", [1, 1 << 16, 1 << 27])
@pytest.mark.parametrize("k", [1, 5])
def test_uneven_cells_and_visits(scores: int, k: int, both: pytest.MonkeyPatch) -> None:
    both.setattr(gpu, "SCORES", scores)
    rng, found = np.random.default_rng(0), []
    base, asked = Rows(unit(2000, 24, 0), np.arange(2000)), Rows(unit(300, 24, 1), np.arange(300))
    cell = rng.geometric(0.1, 2000) - 1
    ways = np.argsort(rng.random((300, 30)) * np.arange(1, 31), axis=1)[:, :6]  # rather the first
    ways[np.arange(6) > rng.integers(6, size=(300, 1))] = NONE
    cells = 1 + max(cell.max(), ways.max())
    for device in (None, DEVICE):
        both.setattr(gpu, "device", lambda device=device: device)
        best = Best(300, k)
        search(asked, Visits.of(ways, cells), Base.of(base, cell, cells), best)
        found.append(best.sorted())
    np.testing.assert_array_equal(found[0].number, found[1].number)


def test_what_has_no_room_on_a_gpu_is_searched_by_the_processor(both: pytest.MonkeyPatch) -> None:
    rows, found = unit(900, 24, 0), []
    for free in (1 << 30, 1000):
        both.setattr(gpu, "device", lambda: DEVICE)
        both.setattr(gpu, "free_bytes", lambda free=free: free)
        held, best = Rows(rows, np.arange(900)), Best(900, 5)
        everywhere = Visits.of(np.zeros((900, 1), np.int64), 1)
        search(held, everywhere, Base.of(held, np.zeros(900, np.int64), 1), best)
        assert ("on_gpu" in vars(held)) == (free > 1000)
        found.append(best.sorted().number)
    np.testing.assert_array_equal(found[0], found[1])


def test_groups_find_the_same(both: pytest.MonkeyPatch) -> None:
    rows, centroids, found = around(60, 3000, 24, 0.1, 0), around(60, 900, 24, 0.1, 1), []
    for device in (None, DEVICE):
        both.setattr(gpu, "device", lambda device=device: device)
        found.append(Groups.over(centroids, rows[:200]).assign(rows, centroids))
    np.testing.assert_array_equal(found[0], found[1])
