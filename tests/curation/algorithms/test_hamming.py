"""Near pairs of hashes, and which of a group stay, against comparing all of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.algorithms import hamming
from curation.algorithms.hamming import Hashes, Ints, comparisons, near_pairs, stays_for


def scattered(count: int, flips: int, seed: int) -> Hashes:
    """Rising hashes; three of four are another one with up to `flips` bits changed."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 2**64, max(1, count // 4), dtype=np.uint64)
    found = [first]
    for _ in range(3):
        moved = found[-1].copy()
        for bit in rng.integers(0, 64, (flips, len(first)), dtype=np.uint64):
            moved ^= np.uint64(1) << bit
        found.append(moved)
    return np.unique(np.concatenate(found))


def all_pairs(hashes: Hashes, bits: int) -> set[tuple[int, int]]:
    near = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= bits
    return set(zip(*(axis.tolist() for axis in np.nonzero(np.triu(near, 1))), strict=True))


def found_pairs(hashes: Hashes, bits: int) -> set[tuple[int, int]]:
    found = set()
    for left, right in near_pairs(hashes, bits):
        found |= {(min(p), max(p)) for p in zip(left.tolist(), right.tolist(), strict=True)}
    return found


@pytest.mark.parametrize("bits", range(11))
@pytest.mark.parametrize("count", [1, 2, 40, 1500])
def test_all_near_pairs_are_found_and_no_others(count: int, bits: int) -> None:
    hashes = scattered(count, bits, seed=count + bits)
    found = found_pairs(hashes, bits)
    assert found == all_pairs(hashes, bits)
    assert found or count < 40 or not bits


@settings(deadline=None, max_examples=60)
@given(
    data=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=30),
    flips=st.lists(st.integers(0, 63), max_size=30),
    bits=st.integers(0, 10),
)
def test_whatever_the_hashes(data: list[int], flips: list[int], bits: int) -> None:
    chained = [data[0]]
    for flip in flips:
        chained.append(chained[-1] ^ 1 << flip)
    hashes = np.unique(np.array(data + chained, np.uint64))
    assert found_pairs(hashes, bits) == all_pairs(hashes, bits)


@pytest.mark.parametrize("bands", [5, 8, 13])
def test_any_number_of_bands_finds_the_same(bands: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hamming, "band_count", lambda hashes, bits: bands)
    hashes = scattered(600, 4, seed=bands)
    assert found_pairs(hashes, 4) == all_pairs(hashes, 4)


def test_more_pairs_than_a_block_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hamming, "BLOCK_PAIRS", 7)
    near = np.uint64(0xF0F0) ^ (np.uint64(1) << np.arange(40, dtype=np.uint64))
    hashes = np.unique(near)
    assert found_pairs(hashes, 2) == all_pairs(hashes, 2) != set()


def test_few_comparisons_are_enough_for_a_billion_hashes() -> None:
    assert comparisons(1_200_000_000, 0) == 0
    assert comparisons(1_200_000_000, 2) < comparisons(1_200_000_000, 4) < 2000


def settled(hashes: Hashes, groups: Ints, bits: int) -> list[tuple[int, int]]:
    """In order: a row goes for the nearest of its group that stays, or stays itself."""
    stay: list[int] = []
    found = []
    for i, hash_ in enumerate(hashes.tolist()):
        near = [
            (apart, other)
            for other in stay
            if groups[other] == groups[i]
            and (apart := (hash_ ^ int(hashes[other])).bit_count()) <= bits
        ]
        apart, other = min(near, default=(0, i))
        stay += [] if near else [i]
        found.append((other, apart))
    return found


@pytest.mark.parametrize("bits", [0, 2, 4, 9])
def test_what_stays_is_the_best_of_what_is_near(bits: int) -> None:
    rng = np.random.default_rng(bits)
    hashes = rng.permutation(np.repeat(scattered(300, max(1, bits // 2), seed=bits), 2))
    groups = np.sort(rng.integers(0, 40, len(hashes)))
    stays, apart = stays_for(hashes, groups, bits)
    assert list(zip(stays.tolist(), apart.tolist(), strict=True)) == settled(hashes, groups, bits)
    assert 0 < (stays != np.arange(len(hashes))).sum() < len(hashes)
