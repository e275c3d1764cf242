"""Spherical k-means against brute force and faiss."""

import faiss
import numpy as np
import pytest
from test_knn import unit

from curation.algorithms.kmeans import assign, fit


def blobs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """6 tight groups of 50 unit rows, and which group each row is of."""
    rng = np.random.default_rng(seed)
    centres = unit(6, 16, seed)
    label = np.repeat(np.arange(6), 50)
    rows = centres[label] + 0.05 * rng.standard_normal((300, 16))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), label


def test_assign_is_the_nearest_centroid() -> None:
    rows, centroids = unit(5000, 24, 0), unit(37, 24, 1)
    cluster, cosine = assign(rows, centroids)
    products = rows.astype(np.float64) @ centroids.T.astype(np.float64)
    np.testing.assert_array_equal(cluster, products.argmax(axis=1))
    np.testing.assert_allclose(cosine, products.max(axis=1), atol=1e-6)


def test_the_objective_never_falls_and_centroids_are_the_mean_directions() -> None:
    rows, _ = blobs(2)
    result = fit(rows, 6, 50, np.random.default_rng(1))
    assert all(b >= a - 1e-9 for a, b in zip(result.objective, result.objective[1:], strict=False))
    cluster, _ = assign(rows, result.centroids)
    for k in range(6):
        mean = rows[cluster == k].mean(axis=0)
        np.testing.assert_allclose(result.centroids[k], mean / np.linalg.norm(mean), atol=1e-5)


def test_the_objective_is_as_good_as_faiss() -> None:
    rows = unit(4000, 32, 3)
    ours = fit(rows, 40, 25, np.random.default_rng(0))
    theirs = faiss.Kmeans(32, 40, niter=25, spherical=True, seed=0)
    theirs.train(rows)
    reference = float(assign(rows, theirs.centroids)[1].mean())
    assert float(assign(rows, ours.centroids)[1].mean()) > reference - 2e-3


@pytest.mark.parametrize("k", [1, 7, 300, 1000])
def test_equal_rows_fewer_rows_than_k_and_opposite_rows_end_well(k: int) -> None:
    same = np.repeat(unit(1, 8, 0), 300, axis=0)
    opposite = np.concatenate([same, -same])
    for rows in (same, opposite, unit(5, 8, 1)):
        result = fit(rows, k, 10, np.random.default_rng(0))
        assert len(result.centroids) == min(k, len(rows))
        np.testing.assert_allclose(np.linalg.norm(result.centroids, axis=1), 1, atol=1e-5)


def test_the_same_seed_gives_the_same_bytes() -> None:
    rows = unit(1000, 16, 4)
    first, second = (fit(rows, 10, 10, np.random.default_rng(7)) for _ in range(2))
    assert first.centroids.tobytes() == second.centroids.tobytes()
