"""The self-join of deduplication against faiss IVF: seconds at equal recall.

    python -m benchmarks.join [--rows 1000000] [--sample 3000]

For each of n rows its 64 nearest above cosine 0.6. Ours is the whole join: cells, the choice of
nprobe, the search, and 64 neighbours a row, each pair given to both of its rows. Of faiss training
and adding are timed whole; its search on 5,000 rows, scaled to all of them; its merge of both
directions not at all.

Recall is measured by brute force on sampled rows, for both alike: of a row's true neighbours, the
64 best where there are more, the share that either end of the pair found.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch

from benchmarks import vectors
from benchmarks.measuring import machine, same_on_threads, say, table, target, timed
from curation.algorithms import knn
from curation.algorithms.products import Floats, Ints

K = 64
MIN_COSINE = 0.6
CLOSE = 0.7
LEAST_RECALL = {MIN_COSINE: 0.99, CLOSE: 0.998}
LEAST_RATIO = 4.0
TIMED = 5000  # queries by which the search of faiss is timed
BLOCK = 50_000
CLOSE_STEP = 1.1  # of nprobe: bisection ends there
Answer = Callable[[Ints], Ints]  # positions (n,) to their neighbours (n, k)


@dataclass(frozen=True)
class Truth:
    """Pairs above MIN_COSINE: a sampled row, its true neighbour, their cosine, (p,) each."""

    row: Ints
    neighbour: Ints
    cosine: Floats

    @classmethod
    def of(cls, rows: Floats, sampled: Ints) -> "Truth":
        """By brute force."""
        row, neighbour, cosine = [], [], []
        asked = torch.from_numpy(rows[sampled])
        for start in range(0, len(rows), BLOCK):
            block = (asked @ torch.from_numpy(rows[start : start + BLOCK]).T).numpy()
            i, j = np.nonzero(block > MIN_COSINE)
            row.append(sampled[i])
            neighbour.append(j + start)
            cosine.append(block[i, j])
        return cls(np.concatenate(row), np.concatenate(neighbour), np.concatenate(cosine))._best()

    def _best(self) -> "Truth":
        """Without the rows themselves, and K of each row."""
        apart = np.flatnonzero(self.row != self.neighbour)
        order = apart[np.lexsort((-self.cosine[apart], self.row[apart]))]
        of_row = self.row[order]
        chosen = order[np.arange(len(order)) - np.searchsorted(of_row, of_row) < K]
        return Truth(self.row[chosen], self.neighbour[chosen], self.cosine[chosen])

    def recall(self, answer: Answer) -> dict[float, float]:
        """By least cosine."""
        there = _holds(answer, self.row, self.neighbour)
        back = _holds(answer, self.neighbour, self.row)
        found = there | back
        return {
            least: float(found[self.cosine > least].mean()) if (self.cosine > least).any() else 1.0
            for least in LEAST_RECALL
        }


def _holds(answer: Answer, row: Ints, neighbour: Ints) -> Any:
    """Which rows (p,) have found the neighbour (p,)."""
    asked, position = np.unique(row, return_inverse=True)
    numbers = answer(asked)
    return (numbers[position] == neighbour[:, None]).any(axis=1)


@dataclass(frozen=True)
class Measured:
    """One way to join."""

    name: str
    seconds: float
    recall: dict[float, float]

    def line(self, ours: float) -> list[str]:
        recalls = (f"{recall:.4f}" for recall in self.recall.values())
        return [self.name, f"{self.seconds:.0f}", *recalls, f"{self.seconds / ours:.1f}"]


class Inverted:
    """faiss IVF over all rows."""

    def __init__(self, rows: Floats, lists: int) -> None:
        dim = rows.shape[1]
        self._rows, self.lists = rows, lists
        faiss.omp_set_num_threads(torch.get_num_threads())
        faiss.cvar.distance_compute_blas_threshold = 1
        index: Any = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT
        )
        index.cp.niter, index.cp.max_points_per_centroid = 8, 64
        self._index = index
        training, _ = timed(index.train, rows)
        adding, _ = timed(index.add, rows)
        self._building = training + adding
        say(f"faiss, {lists} lists: training {training:.1f} s, adding {adding:.1f} s")

    def measure(self, probe: int, truth: Truth, asked: Ints) -> Measured:
        self._index.nprobe = probe
        seconds, _ = timed(self._answer, asked)
        whole = self._building + seconds / len(asked) * len(self._rows)
        found = Measured(
            f"IVF{self.lists}, nprobe {probe}", whole, truth.recall(lambda at: self._answer(at))
        )
        say(f"{found.name}: {whole:.0f} s, {found.recall}")
        return found

    def _answer(self, positions: Ints) -> Ints:
        numbers: Ints = self._index.search(self._rows[positions], K + 1)[1]  # and the row itself
        return numbers

    def around(self, wanted: float, truth: Truth, asked: Ints) -> list[Measured]:
        """The largest nprobe below a recall and the smallest that reaches it, nearly."""
        low, high, below = 0, 1, None
        above = self.measure(high, truth, asked)
        while above.recall[MIN_COSINE] < wanted and high < self.lists:
            low, high, below = high, min(2 * high, self.lists), above
            above = self.measure(high, truth, asked)
        while below and high > CLOSE_STEP * low and high - low > 1:
            middle = (low + high) // 2
            found = self.measure(middle, truth, asked)
            if found.recall[MIN_COSINE] < wanted:
                low, below = middle, found
            else:
                high, above = middle, found
        return [below, above] if below else [above]


def compare(rows: Floats, sample: int, lists: list[int], target_recall: float) -> int:
    """Prints ours beside faiss; returns the targets missed."""
    shuffled = np.random.default_rng(1).permutation(len(rows))
    truth, asked = Truth.of(rows, np.sort(shuffled[:sample])), np.sort(shuffled[:TIMED])
    what = knn.Search(K, MIN_COSINE, itself=True, target_recall=target_recall)
    knn.join(rows[:6000], rows[:6000], what)  # compiled
    seconds, joined = timed(knn.join, rows, rows, what)
    numbers = joined.neighbours.number
    ours = Measured("ours", seconds, truth.recall(lambda at: numbers[at]))
    say(f"ours: {seconds:.0f} s, {joined.cells} cells, nprobe {joined.nprobe}, {ours.recall}")
    others = []
    for count in lists:
        others.append(Inverted(rows, count).around(ours.recall[MIN_COSINE], truth, asked))
    print(f"self-join of {len(rows):,} x {rows.shape[1]}, k = {K}, cosine above {MIN_COSINE}\n")
    head = ["", "s", *(f"recall above {least}" for least in LEAST_RECALL), "times ours"]
    flat = [ours, *(measured for group in others for measured in group)]
    table(head, [measured.line(seconds) for measured in flat])
    close = int((truth.cosine > CLOSE).sum())
    print(f"{len(truth.row):,} pairs of {sample:,} sampled rows, {close:,} above {CLOSE}.")
    print(
        "nprobe of faiss: the last below our recall and the first that reaches it, within 10 %.\n"
    )
    fastest = min(group[0].seconds for group in others)  # ours is equal or better
    missed = target(
        f"{fastest / seconds:.1f} times as fast as faiss, of {LEAST_RATIO}",
        fastest / seconds >= LEAST_RATIO,
    )
    for least, recall in ours.recall.items():
        wanted = LEAST_RECALL[least]
        missed += target(f"recall {recall:.4f} above {least}, of {wanted}", recall >= wanted)
    return missed


def main(arguments: list[str] | None = None) -> int:
    """The number of targets missed."""
    parser = argparse.ArgumentParser(description="The self-join of dedup against faiss.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--sample", type=int, default=3000)
    parser.add_argument("--lists", type=int, nargs="+", default=[4096, 2048])
    parser.add_argument("--target-recall", type=float, default=0.995, help="of ours")
    options = parser.parse_args(arguments)
    print(f"{machine()}\n", flush=True)
    rows = vectors.make(options.rows, vectors.COPIES)
    lists = [min(count, max(1, options.rows // 64)) for count in options.lists]
    missed = compare(rows, min(options.sample, options.rows), lists, options.target_recall)
    few = rows[: max(1, options.rows // 10)]

    def neighbours() -> tuple[Floats, Ints]:
        found = knn.join(few, few, knn.Search(K, MIN_COSINE, itself=True)).neighbours
        return found.score, found.number

    return missed + same_on_threads(f"neighbours of {len(few):,} rows", neighbours)


if __name__ == "__main__":
    sys.exit(main())
