"""Union-find against scipy, and the cutting of chained giants."""

import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from curation.algorithms.components import Components, split_giants


@pytest.mark.parametrize("edges", [0, 50, 900, 5000])
def test_components_are_scipys_whatever_the_order_of_the_blocks(edges: int) -> None:
    rng = np.random.default_rng(edges)
    left, right = rng.integers(0, 1000, (2, edges))
    graph = coo_matrix((np.ones(edges), (left, right)), shape=(1000, 1000))
    _, reference = connected_components(graph, directed=False)
    smallest = np.full(reference.max() + 1, 1000)
    np.minimum.at(smallest, reference, np.arange(1000))
    for order in (np.arange(edges), rng.permutation(edges)):
        components = Components(1000)
        for block in np.array_split(order, 7):
            components.add(left[block], right[block])
        np.testing.assert_array_equal(components.labels(), smallest[reference])


def test_a_node_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="nodes 0 to 9"):
        Components(10).add(np.array([3]), np.array([10]))


def test_a_chain_of_weak_links_is_cut_and_true_copies_stay_together() -> None:
    # Two tight groups of 10 copies, joined through a chain of 10 images by weak links.
    left = np.concatenate([np.arange(9), np.arange(10, 19), np.arange(19, 29), [9]])
    right = np.concatenate([np.arange(1, 10), np.arange(11, 20), np.arange(20, 30), [20]])
    cosine = np.concatenate([np.full(18, 0.97), np.full(11, 0.62)]).astype(np.float32)
    components = Components(31)
    components.add(left, right)
    before = components.labels()
    assert np.bincount(before).max() == 30
    labels, giants = split_giants(before, left, right, cosine, max_size=12)
    assert giants == [(30, 10)]
    assert len(set(labels[:10])) == 1
    assert len(set(labels[10:20])) == 1
    assert labels[0] != labels[10]
    assert labels[30] == 30


def test_a_giant_of_true_copies_is_left_whole() -> None:
    left, right = np.arange(99), np.arange(1, 100)
    components = Components(100)
    components.add(left, right)
    cosine = np.full(99, 0.99, np.float32)
    labels, giants = split_giants(components.labels(), left, right, cosine, max_size=10)
    assert giants == [(100, 100)]
    assert set(labels) == {0}
