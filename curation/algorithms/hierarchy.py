"""Clusters of clusters, and an even share of a number of draws among them.

Vo et al., "Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach"
(arXiv 2405.15613). Level 1 clusters images, level t the centroids of level t-1. Rows and centroids
are unit-norm fp32 (n, D).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from curation.algorithms import kmeans
from curation.algorithms.assign import assign
from curation.algorithms.products import Floats, Ints
from curation.algorithms.sampling import draw_by_cluster

ITERATIONS = 20
RESAMPLINGS = 10
SEEDED = 2000  # k-means++ takes its time with more clusters, and a random start finds most of them


@dataclass(frozen=True)
class Level:
    """A level above the first: its centroids (k, D) and the parent of each cluster below (n,)."""

    centroids: Floats
    parent: Ints


def grow(centroids: Floats, counts: Sequence[int], rng: np.random.Generator) -> list[Level]:
    """The levels above the clusters `centroids` (k, D), with as many clusters as `counts` says.

    A level that would not have fewer clusters than the one below is left out: a small pool has
    fewer clusters than were asked for.
    """
    levels = []
    for count in counts:
        if count < len(centroids):
            above = fit_flat(centroids, count, rng)
            levels.append(Level(above, assign(centroids, above)[0]))
            centroids = above
    return levels


def fit_flat(rows: Floats, k: int, rng: np.random.Generator) -> Floats:
    """Centroids (at most k, D) by k-means with resampling.

    Plain k-means puts centroids where rows are dense. Fitted again on equally many rows of each
    cluster, those nearest to its centroid, it spreads them more evenly over the support
    (algorithm 1).
    """
    centroids = _fit(rows, k, rng)
    for _ in range(RESAMPLINGS):
        cluster, cosine = assign(rows, centroids)
        near = nearest_of_each(cluster, cosine, rows_to_keep(len(rows), k))
        if len(near) <= k:  # each row would be its own centroid
            break
        centroids = _fit(rows[near], k, rng)
    return centroids


def _fit(rows: Floats, k: int, rng: np.random.Generator) -> Floats:
    """With few centroids the start decides what is found, and one from random rows misses some."""
    options = kmeans.Options(start="k-means++" if k <= SEEDED else "random")
    return kmeans.fit(rows, k, ITERATIONS, rng, options).centroids


def rows_to_keep(count: int, k: int) -> int:
    """How many of `count` rows to take from each of k clusters, to fit again on the nearest.

    Half of a cluster's mean size: less than most of them have.
    """
    return max(1, count // (2 * k))


def nearest_of_each(cluster: Ints, cosine: Floats, per_cluster: int) -> Ints:
    """Positions of at most `per_cluster` rows a cluster, the nearest to its centroid; rising.

    Of rows (n,) with their cluster and their cosine to its centroid; of equal ones the first.
    """
    return draw_by_cluster(cluster, -cosine, per_cluster, len(cluster))


def sizes_of_levels(sizes: Ints, levels: Sequence[Level]) -> list[Ints]:
    """Images below each cluster, for every level from the first, whose `sizes` (k,) are given."""
    found = [sizes]
    for level in levels:
        above = np.zeros(len(level.centroids), np.int64)
        np.add.at(above, level.parent, found[-1])
        found.append(above)
    return found


def top_down(total: int, sizes: Sequence[Ints], levels: Sequence[Level]) -> list[Ints]:
    """How many images to draw below each cluster, for every level from the first.

    `sizes` are those of `sizes_of_levels`. The total is shared among the top clusters, the share of
    each among its children, and so on. A level's quotas add up to the total, or to all images.
    """
    parents = [level.parent for level in levels] + [np.zeros(len(sizes[-1]), np.int64)]
    quotas = [np.array([total])]
    for size, parent in zip(sizes[::-1], parents[::-1], strict=True):
        quotas.append(share(quotas[-1], size, parent))
    return quotas[:0:-1]


def share(totals: Ints, sizes: Ints, parent: Ints) -> Ints:
    """Shares each total (p,) among its children of `sizes` (n,), as evenly as these allow: (n,).

    A child gets the least quota for which the children of its `parent` (n,) give the total, and at
    most its size (water-filling). What is left over goes singly to the largest children, of equal
    ones to the first. Exact in integers; sorting is all it costs.
    """
    order = np.lexsort((-np.arange(len(sizes)), sizes, parent))
    size, above = sizes[order].astype(np.int64), parent[order]
    counts = np.bincount(above, minlength=len(totals))
    start = np.cumsum(counts) - counts
    rank = np.arange(len(size)) - start[above]
    before = np.cumsum(size) - size
    before -= before[start[above]]  # images of the smaller children of the same parent
    rest = counts[above] - rank  # this child and those that are larger
    full = before + size * rest <= totals[above]
    filled = np.bincount(above[full], minlength=len(totals))
    given = np.zeros(len(totals), np.int64)
    np.add.at(given, above[full], size[full])
    quota, left = np.divmod(totals - given, np.maximum(counts - filled, 1))
    shares = np.where(full, size, quota[above] + (rest <= left[above]))
    found = np.empty_like(shares)
    found[order] = shares
    return found


def evenness(counts: Ints) -> float:
    """Entropy of images over clusters (k,) by log k: 1 when all have as many, 0 for all in one."""
    share_of = counts[counts > 0] / counts.sum()
    most = np.log(len(counts))
    return float(-(share_of * np.log(share_of)).sum() / most) if most else 1.0
