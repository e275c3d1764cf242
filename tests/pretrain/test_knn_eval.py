"""Evaluation of frozen features against brute force."""

import numpy as np
import pytest
import torch

from pretrain.knn_eval import Features, effective_rank, knn_accuracy, linear_accuracy


def clouds(per_class: int, seed: int, spread: float) -> Features:
    """Three directions in 12 dimensions, and rows around them."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), per_class)
    rows = np.eye(12)[labels] + spread * rng.standard_normal((len(labels), 12))
    cls = torch.from_numpy(rows.astype(np.float32))
    return Features(cls, torch.zeros(len(labels), 2), torch.from_numpy(labels))


@pytest.mark.parametrize("k", [1, 5, 20, 500])
def test_knn_votes_as_brute_force_does(k: int) -> None:
    train, test = clouds(60, 0, 0.6), clouds(30, 1, 0.6)
    left, right = test.cls.double().numpy(), train.cls.double().numpy()
    left /= np.linalg.norm(left, axis=1, keepdims=True)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    wins = 0
    for row, label in zip(left, test.labels.tolist(), strict=True):
        votes, cosine = np.zeros(3), right @ row
        for near in np.argsort(-cosine)[:k]:
            votes[train.labels[near]] += np.exp(cosine[near] / 0.07)
        wins += int(votes.argmax() == label)
    assert 0.5 < wins / 90 < 1
    assert knn_accuracy(train, test, k) == pytest.approx(wins / 90)


def test_a_linear_probe_finds_what_is_linear() -> None:
    found = linear_accuracy(clouds(60, 0, 0.2), clouds(30, 1, 0.2))
    assert found["accuracy"] > 0.95
    noise = linear_accuracy(clouds(60, 0, 50.0), clouds(30, 1, 50.0))
    assert noise["accuracy"] < 0.6


def test_the_rank_falls_as_features_collapse() -> None:
    rows = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    assert 15 < effective_rank(rows) <= 16
    assert effective_rank(rows[:, :3] @ torch.randn(3, 16)) <= 3.001
    assert effective_rank(torch.ones(10, 4)) == pytest.approx(1, abs=0.01)
