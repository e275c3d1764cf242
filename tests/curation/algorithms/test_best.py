"""The heaps of the k best: the same whatever the order of the offers."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.algorithms.best import Best, offer
from curation.algorithms.products import NONE

PAIRS = st.lists(
    st.tuples(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0]), st.integers(0, 30)),
    max_size=40,
    unique_by=lambda pair: pair[1],
)


def kept(pairs: list[tuple[float, int]], k: int, floor: float, again: bool) -> Best:
    best = Best(1, k, floor)
    for score, number in pairs:
        offer(best.score[0], best.number[0], np.float32(score), number, again)
    return best


@settings(deadline=None)  # the first call compiles
@given(
    pairs=PAIRS,
    k=st.integers(1, 9),
    floor=st.sampled_from([-np.inf, -0.5, 0.3]),
    again=st.booleans(),
    data=st.data(),
)
def test_any_order_of_offers_gives_the_same_heap(
    pairs: list[tuple[float, int]], k: int, floor: float, again: bool, data: st.DataObject
) -> None:
    offers = data.draw(st.permutations(pairs * 2 if again else pairs))
    found = kept(list(offers), k, floor, again).sorted()
    wanted = sorted((-score, number) for score, number in pairs if score > floor)[:k]
    padding = k - len(wanted)
    assert found.number[0].tolist() == [number for _, number in wanted] + [NONE] * padding
    assert found.score[0].tolist() == [-score for score, _ in wanted] + [-np.inf] * padding


def test_the_worst_stands_first_while_offers_come() -> None:
    best = Best(1, 3)
    for score, number in [(0.1, 4), (0.9, 1), (0.1, 2), (0.5, 7), (0.1, 3)]:
        offer(best.score[0], best.number[0], np.float32(score), number, False)
    assert (best.score[0, 0], best.number[0, 0]) == (np.float32(0.1), 2)
