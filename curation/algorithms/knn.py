"""kNN join: the k nearest of a base for every query, or every pair above a score, by cells.

Base rows are put in cells; a query asks in those near to it, where it is compared with every row.
How near is the least that reaches a target recall on a sample of queries whose true neighbours are
known. A self-join offers each pair to both of its rows, so it is enough if one of
them asks in the other's cell.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from curation.algorithms.best import Best, Neighbours
from curation.algorithms.cells import LEAST, NEAR_SHARE, SAMPLE_PER_CELL, Cells, Reach, rises
from curation.algorithms.crowds import ALIKE, without_crowds
from curation.algorithms.equal import first_of_equal
from curation.algorithms.products import NONE, Floats, Ints, check_finite
from curation.algorithms.search import search
from curation.algorithms.visits import Base, Rows, Twins, Visits

Bools = npt.NDArray[np.bool_]

ROWS_PER_CELL = 256  # at least
CELLS = 3  # times the square root of half the harmonic mean of queries and base
FEW_CELLS = 16  # bases of so few cells are searched whole
SAMPLE_QUERIES, SPREAD = 2048, 8  # of a sample; see `Sampling`
MOST, LONGEST_WAY = 128, 2048  # cells that a query asks in: twice as many while these don't do
ROUNDING = 1e-6  # of a margin
TELLING, UNTOLD = 100, 0.1  # fewer pairs of a sample choose no smaller margin: common copies' own
CHUNK_ROWS = 262_144
EXACT_ROWS = 8192  # of a base, compared by one thread
ROW_BITS = 40  # above them a row's position stands, below the number of its neighbour


class RecallError(ValueError):
    """The target recall can't be reached."""


@dataclass(frozen=True)
class Search:
    """What is asked: the k best above `min_score`, with `itself` among the base's own rows."""

    k: int
    min_score: float = -np.inf
    itself: bool = False
    target_recall: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    @property
    def turns(self) -> tuple[slice, ...]:
        """Parts of a query's way, searched one after the other: what its nearest cell holds is so
        good that few rows of the others have to be looked at more closely. Pairs of a self-join
        have a floor from the start."""
        return (slice(None),) if self.itself else (slice(1), slice(1, None))

    @property
    def alike(self) -> float:
        """Above this product, any neighbours of a row are as good as its nearest."""
        return max(ALIKE, self.min_score) if self.itself else np.inf

    def telling(self, truth: Neighbours) -> Bools:
        """Which of some queries (n,), by their true neighbours, must find just these."""
        telling: Bools = np.any(truth.score <= self.alike, axis=1)
        return telling


@dataclass(frozen=True)
class Sampling:
    """How many queries tell the recall, each compared with one in `spread` rows of the base.

    If all above a score is wanted, a part of the base tells as much of them. Neighbours of one
    query are met or missed together: some of many queries' tell more than all of a few.
    """

    queries: int
    spread: int

    @classmethod
    def of(cls, what: Search, queries: int) -> "Sampling":
        """For a search of so many queries."""
        spread = min(SPREAD, max(1, queries // SAMPLE_QUERIES))
        if what.min_score == -np.inf:
            spread = 1
        return cls(min(queries, SAMPLE_QUERIES * spread), spread)

    def part(self, base: Rows, rng: np.random.Generator) -> Rows:
        """The rows that the queries are compared with."""
        if self.spread == 1:
            return base
        chosen = np.flatnonzero(rng.integers(self.spread, size=len(base)) == 0)
        return Rows(base.vectors[chosen], base.numbers[chosen])

    def asked(self, what: Search) -> Search:
        """What is asked of them: as many times fewer neighbours."""
        return replace(what, k=-(-what.k // self.spread))


@dataclass(frozen=True)
class Joined:
    """Neighbours (n, k), and how they were found: queries ask in `nprobe` of the cells on average,
    and `recall` is measured on a sample."""

    neighbours: Neighbours
    cells: int
    nprobe: float
    recall: float


def join(queries: Floats, base: Floats, what: Search) -> Joined:
    """The neighbours of unit rows (n, D) in a base of unit rows (m, D), by product.

    With `what.itself` the queries must be the base; of equal rows only the first is compared, the
    others have it as their one neighbour and are no one's. Numbers are positions in the base.
    Errors: ValueError for rows that aren't finite, RecallError.
    """
    queries, base = (np.ascontiguousarray(rows, np.float32) for rows in (queries, base))
    check_finite(base)
    squares = check_finite(queries)
    if not len(base) or not len(queries):
        return Joined(Best(len(queries), what.k).sorted(), 0, 0, 1.0)
    rng = np.random.default_rng(what.seed)
    kept = first_of_equal(base) if what.itself else np.arange(len(base))
    distinct = np.flatnonzero(kept == np.arange(len(base)))
    rows = base if len(distinct) == len(base) else base[distinct]
    asking = distinct if what.itself else np.arange(len(queries))
    telling = asking[squares[asking] > 0]  # all neighbours of a zero are alike
    cells = fit_cells(rows, len(telling), rng)
    sampling = Sampling.of(what, len(telling))
    sampled = np.sort(rng.choice(telling, sampling.queries, replace=False))
    sample = Rows(queries[sampled], sampled if what.itself else np.full(len(sampled), NONE))
    held = Rows(rows, distinct)
    truth = exact(sample, [sampling.part(held, rng)], sampling.asked(what))
    must = np.where(what.telling(truth)[:, None], truth.number, NONE)
    reach = choose_reach(cells, sample.vectors, Pairs.of(must, base, cells), what)
    best = Best(len(queries), what.k, what.min_score)
    turns, cell = _visits(cells, rows if what.itself else queries, asking, reach, what.turns)
    if what.itself:
        cell[~standing(rows, cell, len(cells), what)] = NONE
        all_of = held if rows is base else Rows(base, np.arange(len(base)))
        search(all_of, turns[0], Base.of(held, cell, len(cells)), best, Twins(best, distinct))
    else:
        whole = Base.of(held, cells.assign(rows), len(cells))
        asked = Rows(queries, np.full(len(queries), NONE))
        for visits in turns:
            search(asked, visits, whole, best)
    found = best.sorted()
    measured = recall(Neighbours(found.score[sampled], found.number[sampled]), truth, what.alike)
    if measured < what.target_recall:
        raise RecallError(f"recall {measured:.4f} on a sample, below {what.target_recall}")
    if what.itself:
        _join_equal(found, kept, base, what.min_score)
    nprobe = sum(len(visits.queries) for visits in turns) / len(asking)
    return Joined(found, len(cells), nprobe, measured)


def standing(rows: Floats, cell: Ints, cells: int, what: Search) -> Bools:
    """Which rows (m, D) of a self-join, put in cells (m,), answer those that ask (m,)."""
    if cells <= FEW_CELLS:
        return np.ones(len(rows), np.bool_)
    return without_crowds(rows, cell, cells, what.alike)


def _visits(
    cells: Cells, rows: Floats, asking: Ints, reach: Reach, turns: Sequence[slice]
) -> tuple[list[Visits], Ints]:
    """Which rows (n, D), named `asking` (n,), visit each cell, by turns, each a slice of the way
    of a row; and the nearest cell of each."""
    parts: list[list[Visits]] = [[] for _ in turns]
    nearest = np.empty(len(rows), np.int64)
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        way = cells.way(rows[chunk], reach)
        nearest[chunk] = way[:, 0]
        for turn, of_turn in zip(turns, parts, strict=True):
            some = Visits.of(way[:, turn], len(cells))
            of_turn.append(Visits(asking[chunk][some.queries], some.starts))
    return [Visits.joined(of_turn) for of_turn in parts], nearest


def _join_equal(found: Neighbours, kept: Ints, rows: Floats, min_score: float) -> None:
    """Gives rows that repeat an earlier one that one as their neighbour."""
    again = np.flatnonzero(kept != np.arange(len(kept)))
    score = np.einsum("nd,nd->n", rows[again], rows[again])
    again, score = again[score > min_score], score[score > min_score]
    found.score[again, 0], found.number[again, 0] = score, kept[again]


def cell_count(base_rows: int, queries: int) -> int:
    """How many cells: all rows are compared with all of them, and queries with the rows of some, so
    that for few queries few are best."""
    root = (base_rows * queries / max(1, base_rows + queries)) ** 0.5
    return max(1, min(base_rows // ROWS_PER_CELL, int(CELLS * root)))


def fit_rows(base_rows: int, cells: int) -> int:
    """How many rows of a base its cells are fitted on."""
    return min(base_rows, SAMPLE_PER_CELL * max(FEW_CELLS, cells))


def fit_cells(base: Floats, queries: int, rng: np.random.Generator) -> Cells:
    """Cells of a sample of base rows (m, D), for so many queries."""
    count = cell_count(len(base), queries)
    chosen = np.sort(rng.choice(len(base), fit_rows(len(base), count), replace=False))
    return Cells.fit(base[chosen], count, rng)


def exact(queries: Rows, base: Iterable[Rows], what: Search) -> Neighbours:
    """The true neighbours of a few queries (n), by comparing them with all blocks of the base."""
    best = Best(len(queries), what.k, what.min_score)
    for block in base:
        starts = np.r_[np.arange(0, len(block), EXACT_ROWS), len(block)]
        whole = Base.in_order(block, starts)
        everywhere = np.tile(np.arange(len(starts) - 1), (len(queries), 1))
        visits = Visits.of(everywhere, len(starts) - 1)
        # A heap that no one reads takes the other direction, so that no row meets itself.
        itself = Twins(Best(len(block), 1, np.inf), np.arange(len(block)))
        search(queries, visits, whole, best, itself if what.itself else None)
    return best.sorted()


@dataclass(frozen=True)
class Pairs:
    """True neighbours of sampled queries: the query's position (p,), and of the neighbour its cell
    (p,) and, for a self-join, its row (p, D)."""

    query: Ints
    cell: Ints
    rows: Floats

    @classmethod
    def of(cls, truth: Ints, base: Floats, cells: Cells) -> "Pairs":
        """From numbers of neighbours (s, k) in a base (m, D) that lies in cells."""
        query, column = np.nonzero(truth != NONE)
        rows = base[truth[query, column]]
        return cls(query, cells.assign(rows), rows)


def choose_reach(cells: Cells, sample: Floats, pairs: Pairs, what: Search) -> Reach:
    """The least reach by which sampled queries (s, D) meet their neighbours.

    Errors: RecallError when more than LONGEST_WAY cells would be needed.
    """
    if len(cells) <= FEW_CELLS:
        return Reach(np.inf, len(cells))
    # Few pairs tell little: copies that are rare are found as well as those that are common.
    least = -np.inf if len(pairs.query) >= TELLING else UNTOLD
    if not len(pairs.query):
        return Reach(least, min(MOST, len(cells)))
    back, most = cells.assign(sample)[pairs.query], MOST
    while True:
        most = min(most, LONGEST_WAY, len(cells))
        needed = _needed(cells, sample, pairs.query, pairs.cell, most)
        if what.itself:
            alike = np.arange(len(back))
            needed = np.minimum(needed, _needed(cells, pairs.rows, alike, back, most))
        steps = np.unique(needed[needed < np.inf])
        enough = bisect_left(
            steps,
            True,
            key=lambda margin: _surely(needed <= margin, pairs.query) >= what.target_recall,
        )
        if enough < len(steps):
            return Reach(max(float(steps[enough]) + ROUNDING, least), most)
        if most == min(LONGEST_WAY, len(cells)):
            raise RecallError(
                f"recall {what.target_recall} needs more than {most} of {len(cells)} cells"
            )
        most *= 2


def _surely(met: Bools, query: Ints) -> float:
    """The share of pairs (p,) that are met, less its standard error: neighbours of one query (p,)
    are met or missed together, so that what counts is the number of queries."""
    share = float(met.mean())
    off = np.bincount(query, met - share)
    return share - float(np.sqrt(np.square(off).sum())) / len(met)


def _needed(cells: Cells, rows: Floats, row: Ints, target: Ints, most: int) -> Floats:
    """The margin with which rows[row] ask in cell `target` (p,): infinite if they never do."""
    near = cells.nearest(rows, most)
    at = near.number[row] == target[:, None]
    place = at.argmax(axis=1)
    share = np.float32(NEAR_SHARE) * near.score[row, 0]
    needed: Floats = (share - near.score[row, place] + rises(place)).astype(np.float32)
    needed[place < LEAST] = -np.inf
    needed[~at.any(axis=1)] = np.inf
    return needed


def recall(found: Neighbours, truth: Neighbours, alike: float = np.inf) -> float:
    """The share of true neighbours (n, t) that were found (n, k), or were not as good as any of k.

    To a row whose neighbours are all above `alike` one of these counts as all.
    """
    row, column = np.nonzero(truth.number != NONE)
    if not len(row):
        return 1.0
    keys = (np.arange(len(found.number))[:, None] << ROW_BITS) | found.number
    listed = np.isin((row << ROW_BITS) | truth.number[row, column], keys[found.number != NONE])
    outdone = truth.score[row, column] <= found.score.min(axis=1)[row] + 1e-6
    joined = np.all(truth.score > alike, axis=1) & np.any(found.score > alike, axis=1)
    return float((listed | outdone | np.take(joined, row)).mean())
