import pytest
import torch
from torch.nn import functional

from pretrain import scores
from pretrain.losses.centering import AllReduce, SoftmaxCenter, Targets, sinkhorn_knopp
from pretrain.scores import Scores

TEMPERATURE = 0.04


@pytest.fixture(autouse=True, params=["kept", "some kept", "made again", "row by row", "on a GPU"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a matrix is kept, by a part of the ranks, and goes through as one or row by row, is
    all the same; as are the operations that a GPU runs.
    """
    if request.param == "on a GPU":
        monkeypatch.setattr(scores, "on_cpu", lambda _: False)
    elif request.param != "kept":
        rows = 4 if request.param == "some kept" else 0
        monkeypatch.setattr(scores, "KEPT_BYTES", rows * 4 * 12)
    if request.param == "row by row":
        monkeypatch.setattr(scores, "CHUNK_BYTES", 4 * 12)


def logits(rows: int, prototypes: int = 12, scale: float = 0.3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, prototypes, generator=generator)


def of(logits: torch.Tensor) -> Scores:
    """With one prototype an axis."""
    return Scores(logits, torch.eye(logits.shape[1]))


def whole(targets: Targets) -> torch.Tensor:
    return targets.rows(0, len(targets))


def naive(scores: torch.Tensor, iterations: int) -> torch.Tensor:
    """The published loop, in fp64, entry by entry."""
    q = [[float(s) for s in row] for row in (scores.double() / TEMPERATURE).exp()]
    rows, columns = len(q), len(q[0])
    for _ in range(iterations):
        for k in range(columns):
            mass = sum(row[k] for row in q)
            for row in q:
                row[k] /= mass * columns
        for row in q:
            mass = sum(row)
            row[:] = [value / mass / rows for value in row]
    return torch.tensor([[value * rows for value in row] for row in q], dtype=torch.float64)


@pytest.mark.parametrize("iterations", [1, 3, 5])
def test_sinkhorn_is_the_published_loop(iterations: int) -> None:
    scores = logits(7)
    found = whole(sinkhorn_knopp(of(scores), TEMPERATURE, iterations))
    assert torch.allclose(found.double(), naive(scores, iterations), rtol=1e-4, atol=1e-7)
    assert torch.allclose(found.sum(dim=1), torch.ones(7))


def test_large_scores_overflow_nothing() -> None:
    scores = logits(7) + 3.0  # exp(3 / .04) alone fits in fp32; exp(40 / .04) in nothing
    expected = whole(sinkhorn_knopp(of(scores), TEMPERATURE))
    shifted = whole(sinkhorn_knopp(of(scores + 37.0), TEMPERATURE))
    assert torch.allclose(shifted, expected, rtol=1e-2, atol=1e-5)
    wide = whole(sinkhorn_knopp(of(logits(7, scale=30.0)), TEMPERATURE))
    assert wide.isfinite().all()
    assert torch.allclose(wide.sum(dim=1), torch.ones(7), atol=1e-3)


def test_unequal_ranks_together_give_what_one_gives() -> None:
    """Threads would deadlock on a barrier: the ranks' steps are run in lockstep by generators."""
    scores = logits(9)
    together = whole(sinkhorn_knopp(of(scores), TEMPERATURE))
    found = in_lockstep(of(scores).split([5, 0, 4]))
    assert torch.allclose(torch.cat(found), together, rtol=1e-5, atol=1e-8)


def in_lockstep(parts: list[Scores]) -> list[torch.Tensor]:
    """Runs one thread a rank; a barrier exchanges their values."""
    from threading import Barrier, Thread

    barrier, shelf, out = Barrier(len(parts)), [None] * len(parts), [None] * len(parts)

    def reducer(rank: int, how: str) -> object:
        def reduce(value: torch.Tensor) -> torch.Tensor:
            shelf[rank] = value
            barrier.wait()
            stacked = torch.stack(list(shelf))
            barrier.wait()
            return stacked.sum(dim=0) if how == "sum" else stacked.amax(dim=0)

        return reduce

    def run(rank: int) -> None:
        reduce = AllReduce(reducer(rank, "sum"), reducer(rank, "max"))
        out[rank] = whole(sinkhorn_knopp(parts[rank], TEMPERATURE, reduce=reduce))

    threads = [Thread(target=run, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def test_autocast_leaves_sinkhorn_in_fp32() -> None:
    scores = logits(7)
    expected = whole(sinkhorn_knopp(of(scores), TEMPERATURE))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whole(sinkhorn_knopp(of(scores), TEMPERATURE)), expected)


def test_the_centre_lags_one_step() -> None:
    center, first, second = SoftmaxCenter(12, momentum=0.9), logits(5), logits(5, seed=1)
    found = whole(center(of(first), TEMPERATURE))
    assert torch.allclose(found, functional.softmax(first / TEMPERATURE, dim=1))
    moved = 0.1 * first.mean(dim=0)
    assert torch.allclose(center.center, moved, atol=1e-7)
    found = whole(center(of(second), TEMPERATURE))
    assert torch.allclose(found, functional.softmax((second - moved) / TEMPERATURE, dim=1))
    assert torch.allclose(center.center, 0.9 * moved + 0.1 * second.mean(dim=0), atol=1e-7)


def test_the_centre_is_the_mean_over_all_ranks_rows() -> None:
    here, there = logits(5), logits(3, seed=1)

    def with_the_other(total: torch.Tensor) -> torch.Tensor:
        return total + torch.cat([there.sum(dim=0), torch.tensor([3.0])])

    center = SoftmaxCenter(12, momentum=0.0)
    center(of(here), TEMPERATURE, AllReduce(sum=with_the_other))
    assert torch.allclose(center.center, torch.cat([here, there]).mean(dim=0), atol=1e-6)
