import pytest
import torch
from torch.nn import functional

from pretrain.losses.centering import AllReduce, SoftmaxCenter, sinkhorn_knopp

TEMPERATURE = 0.04


def logits(rows: int, prototypes: int = 12, scale: float = 0.3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, prototypes, generator=generator)


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
    found = sinkhorn_knopp(scores.clone(), TEMPERATURE, iterations)
    assert torch.allclose(found.double(), naive(scores, iterations), rtol=1e-4, atol=1e-7)
    assert torch.allclose(found.sum(dim=1), torch.ones(7))


def test_large_scores_overflow_nothing() -> None:
    scores = logits(7) + 3.0  # exp(3 / .04) alone fits in fp32; exp(40 / .04) in nothing
    expected = sinkhorn_knopp(scores.clone(), TEMPERATURE)
    shifted = sinkhorn_knopp(scores + 37.0, TEMPERATURE)
    assert torch.allclose(shifted, expected, rtol=1e-2, atol=1e-5)
    wide = sinkhorn_knopp(logits(7, scale=30.0), TEMPERATURE)
    assert wide.isfinite().all()
    assert torch.allclose(wide.sum(dim=1), torch.ones(7), atol=1e-3)


def test_unequal_ranks_together_give_what_one_gives() -> None:
    """Threads would deadlock on a barrier: the ranks' steps are run in lockstep by generators."""
    scores = logits(9)
    whole = sinkhorn_knopp(scores.clone(), TEMPERATURE)
    parts = scores.split([5, 0, 4])
    found = in_lockstep([part.clone() for part in parts])
    assert torch.allclose(torch.cat(found), whole, rtol=1e-5, atol=1e-8)


def in_lockstep(parts: list[torch.Tensor]) -> list[torch.Tensor]:
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
        out[rank] = sinkhorn_knopp(parts[rank], TEMPERATURE, reduce=reduce)

    threads = [Thread(target=run, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def test_autocast_leaves_sinkhorn_in_fp32() -> None:
    scores = logits(7)
    expected = sinkhorn_knopp(scores.clone(), TEMPERATURE)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sinkhorn_knopp(scores.clone(), TEMPERATURE), expected)


def test_the_centre_lags_one_step() -> None:
    center, first, second = SoftmaxCenter(12, momentum=0.9), logits(5), logits(5, seed=1)
    found = center(first, TEMPERATURE)
    assert torch.allclose(found, functional.softmax(first / TEMPERATURE, dim=1))
    moved = 0.1 * first.mean(dim=0)
    assert torch.allclose(center.center, moved, atol=1e-7)
    found = center(second, TEMPERATURE)
    assert torch.allclose(found, functional.softmax((second - moved) / TEMPERATURE, dim=1))
    assert torch.allclose(center.center, 0.9 * moved + 0.1 * second.mean(dim=0), atol=1e-7)


def test_the_centre_is_the_mean_over_all_ranks_rows() -> None:
    here, there = logits(5), logits(3, seed=1)

    def with_the_other(total: torch.Tensor) -> torch.Tensor:
        return total + torch.cat([there.sum(dim=0), torch.tensor([3.0])])

    center = SoftmaxCenter(12, momentum=0.0)
    center(here, TEMPERATURE, AllReduce(sum=with_the_other))
    assert torch.allclose(center.center, torch.cat([here, there]).mean(dim=0), atol=1e-6)
