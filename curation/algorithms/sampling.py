"""Which images are drawn: seeded priorities by content, cluster draws, k distinct a query."""

import heapq

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


def priorities(id_words: Words, seed: int) -> Words:
    """A pseudo-random uint64 for each image from its id's first 8 bytes (n,) and a seed.

    It depends on the image alone, so draws and shuffles don't change with the order of the sources.
    splitmix64 (Steele, Lea and Flood 2014).
    """
    with np.errstate(over="ignore"):
        z = id_words + np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15)
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def draw_by_cluster(
    cluster: Ints, priority: Words | Floats, per_cluster: int | Ints, cap: int
) -> Ints:
    """Positions of at most `per_cluster` rows a cluster and `cap` in all, lowest priority first.

    `per_cluster` is one quota for all or each cluster's own (k,). With random priorities both cuts
    are uniform draws without replacement. A cluster that is smaller than its quota gives what it
    has. Feeding back survivors with new rows gives the same result as one call over everything.
    """
    order = np.lexsort((priority, cluster))
    sorted_cluster = cluster[order]
    starts = np.flatnonzero(np.r_[True, sorted_cluster[1:] != sorted_cluster[:-1]])
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    quota = per_cluster if isinstance(per_cluster, int) else per_cluster[sorted_cluster]
    chosen = order[rank < quota]
    if len(chosen) > cap:
        chosen = chosen[np.argsort(priority[chosen], kind="stable")[:cap]]
    return np.sort(chosen)


def backfill(cosine: Floats, number: Ints, k: int) -> npt.NDArray[np.bool_]:
    """Which of the candidates (n, depth) to take so that each query gets k images of its own.

    Candidates of a query are ordered by falling cosine; -1 marks none. An image goes to the query
    that is nearest to it; a query that loses one falls back to its next candidate. Ends when every
    query has k or no candidates are left.
    """
    taken = np.zeros(number.shape, bool)
    owner: dict[int, int] = {}
    have = np.zeros(len(number), np.int64)
    heap = [
        (-float(cosine[q, 0]), int(number[q, 0]), q, 0)
        for q in range(len(number))
        if number.shape[1]
    ]
    heapq.heapify(heap)
    while heap:
        _, image, query, rank = heapq.heappop(heap)
        if image < 0:
            continue
        if image not in owner:
            owner[image] = query
            taken[query, rank] = True
            have[query] += 1
        if have[query] < k and rank + 1 < number.shape[1]:
            following = (-float(cosine[query, rank + 1]), int(number[query, rank + 1]))
            heapq.heappush(heap, (*following, query, rank + 1))
    return taken
