"""k-means, spherical or plain, over an array or over blocks of rows that need not fit in memory.

`fit(rows, k, iterations, rng)` and `fit_blocks(blocks, k, iterations, rng)` give the same bytes
for the same rows, however they are cut and on however many threads: assignments are exact
(`assign.py`) and sums are whole numbers (`lloyd.py`). Above `groups.MANY` unit centroids, .995 of
the assignments are exact, and the same ones however the rows are cut.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numba
import numpy as np

from curation.algorithms.assign import assigner
from curation.algorithms.groups import AGREEMENT_ROWS, assigners
from curation.algorithms.lloyd import Assign, Blocks, BlockSweep, Clustering, Metric, lloyd
from curation.algorithms.products import Floats, Ints, as_rows, check_finite
from curation.algorithms.tiles import each_tile

Note = Callable[[Clustering], Any]

UNIT = 0.02  # how far the square of a unit row may be from 1: fp16 rows are off by 1e-3
SEEDING_ROWS = 32  # rows a centroid that k-means++ chooses from
SEEDING_TILE = 4096
SETTLING_ROWS = 64  # a centroid
LEAST_SETTLING = 16  # of them, else it isn't worth it
SETTLING_MOST = 262_144  # rows
SETTLING_ITERATIONS = 10
PROBE_SEED = (3, 14, 16)  # nobody else's: a fit of seed 0 may have begun from the rows of seed 0


@dataclass(frozen=True)
class Options:
    """`spherical`: unit rows and centroids, by cosine; else any rows, means, squared distance.

    `start`: `random` rows, or `k-means++`, which finds small far groups and ignores copies. It
    costs 32 k^2 (2 + ln k) distances one centroid after the other: sensible up to k = 2,000 or so.
    Random ones first settle on a sample of 64 rows a centroid, if that is less than half of all:
    centroids move most in the first iterations, and with all rows those cost most.
    `make_assigner(spherical)` makes what finds the nearest centroids of one block, call after call;
    None: exactly or, of very many, through groups (`groups.assigners`).
    """

    spherical: bool = True
    start: Literal["random", "k-means++"] = "random"
    make_assigner: Callable[[bool], Assign] | None = None


DEFAULT = Options()


def fit(
    rows: Floats,
    k: int,
    iterations: int,
    rng: np.random.Generator,
    options: Options = DEFAULT,
    note: Note = lambda _: None,
) -> Clustering:
    """Centroids (min(k, n), D) of rows (n, D); see `fit_blocks`."""
    return fit_blocks(lambda: [rows], k, iterations, rng, options, note)


def fit_blocks(
    blocks: Blocks,
    k: int,
    iterations: int,
    rng: np.random.Generator,
    options: Options = DEFAULT,
    note: Note = lambda _: None,
) -> Clustering:
    """Centroids (min(k, n), D) of all rows of `blocks`: at most `iterations` of Lloyd's.

    Each call of `blocks` gives the same arrays (n_i, D) in the same order: two passes to look and
    to start, one an iteration, and one more above `groups.MANY` centroids. Held meanwhile: 100
    bytes a row, the centroids and their sums, and 4 k bytes a block and iteration, so that blocks
    should not be much smaller than k rows. A repeated centroid, as of copies, gets no rows.
    `note` is called after each iteration.
    Raises ValueError for no rows, rows that are not finite and, if spherical, not of unit norm
    (zeros as well: they have no direction).
    """
    count, metric = look(blocks, options.spherical)
    start = first_centroids(blocks, count, k, rng, options.start, metric)
    make = options.make_assigner
    if make is None:
        make = assigners(options.spherical, min(k, count), lambda: probe(blocks, count))
    sweep = BlockSweep(blocks, metric, make)
    return lloyd(Clustering(start, ()), sweep, iterations, metric, note)


def look(blocks: Blocks, spherical: bool) -> tuple[int, Metric]:
    """How many rows there are, and a metric for them. Raises ValueError, see `fit_blocks`."""
    count, longest = 0, 0.0
    for block in blocks():
        rows = as_rows(block)
        squares = check_finite(rows)
        off = np.flatnonzero(np.abs(squares - 1) > UNIT)
        if spherical and len(off):
            shown = ", ".join(map(str, off[:5]))
            raise ValueError(
                f"{len(off)} of {len(rows)} vectors are not of norm 1 (rows {shown}): spherical"
                " k-means needs unit rows; leave zeros out and normalise the others"
            )
        count, longest = count + len(rows), max(longest, squares.max(initial=0.0))
    if not count:
        raise ValueError("there are no rows to cluster")
    return count, Metric() if spherical else Metric.plain(float(np.sqrt(longest)))


def first_centroids(
    blocks: Blocks, count: int, k: int, rng: np.random.Generator, how: str, metric: Metric
) -> Floats:
    """min(k, count) centroids for the `count` rows of all blocks to start from: see `Options`."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    k = min(k, count)
    if how == "k-means++":
        drawn = min(SEEDING_ROWS * k, count)
        rows = _taken(blocks, np.sort(rng.choice(count, drawn, replace=False)))
        return rows[_plus_plus(rows, k, rng)]
    per_centroid = min(SETTLING_ROWS, SETTLING_MOST // k)
    settles = LEAST_SETTLING <= per_centroid < count / k / 2
    positions = rng.choice(count, k * per_centroid if settles else k, replace=False)
    rows = _taken(blocks, np.sort(positions))
    if not settles:
        return rows
    begin = Clustering(rows[np.sort(rng.choice(len(rows), k, replace=False))], ())
    sweep = BlockSweep(lambda: [rows], metric, assigner)
    return lloyd(begin, sweep, SETTLING_ITERATIONS, metric).centroids


def probe(blocks: Blocks, count: int) -> Floats:
    """Rows drawn from all `count` of the blocks, on which finding the nearest is tried."""
    rng = np.random.default_rng(PROBE_SEED)
    return _taken(blocks, np.sort(rng.choice(count, min(AGREEMENT_ROWS, count), replace=False)))


def _taken(blocks: Blocks, positions: Ints) -> Floats:
    """The rows at rising positions over all blocks."""
    found, start = [], 0
    for block in blocks():
        low, high = np.searchsorted(positions, [start, start + len(block)])
        found.append(as_rows(block)[positions[low:high] - start])
        start += len(block)
    return np.concatenate(found)


def _plus_plus(rows: Floats, k: int, rng: np.random.Generator) -> Ints:
    """Positions (k,) chosen with a chance that grows with the squared distance to those before.

    Arthur and Vassilvitskii (SODA 2007), each time the best of 2 + ln k draws (section 5 there).
    Distances are sums of squared differences: those of copies are 0, and they are never drawn.
    """
    draws = 2 + int(np.log(k))
    chosen = np.empty(k, np.int64)
    nearest = np.full((1, len(rows)), np.inf, np.float32)
    for number in range(k):
        reach = np.cumsum(nearest[0], dtype=np.float64)
        if number == 0:
            candidates = rng.integers(len(rows), size=1)
        elif reach[-1] > 0:
            candidates = np.searchsorted(reach, rng.random(draws) * reach[-1], side="right")
            candidates = np.minimum(candidates, len(rows) - 1)
        else:  # every row has been chosen, or a copy of it
            candidates = rng.integers(len(rows), size=1)
        closer = np.minimum(_distances(rows, rows[candidates]), nearest)
        best = int(np.argmin(closer.sum(axis=1, dtype=np.float64)))
        chosen[number], nearest = candidates[best], closer[best : best + 1]
    return chosen


def _distances(rows: Floats, points: Floats) -> Floats:
    """Squared distances (m, n) of points (m, D) to rows (n, D)."""
    found = np.empty((len(points), len(rows)), np.float32)
    each_tile(len(rows), SEEDING_TILE, lambda a, b: _squared_distances(a, b, rows, points, found))
    return found


@numba.njit(nogil=True, cache=True, fastmath={"nnan", "nsz", "reassoc", "contract"})
def _squared_distances(start: int, stop: int, rows: Floats, points: Floats, out: Floats) -> None:
    for i in range(start, stop):
        for p in range(points.shape[0]):
            total = np.float32(0.0)
            for d in range(rows.shape[1]):
                apart = rows[i, d] - points[p, d]
                total += apart * apart
            out[p, i] = total
