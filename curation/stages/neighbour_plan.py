"""What the steps of a neighbour search share: what is asked, in which chunks, by which cells."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation.algorithms import knn
from curation.algorithms.best import Neighbours
from curation.algorithms.cells import Cells, Reach
from curation.algorithms.knn import Sampling
from curation.algorithms.products import Ids, Ints
from curation.algorithms.visits import Rows
from curation.runtime.store import Store
from curation.stages.tables import Part, VectorView


@dataclass(frozen=True)
class SearchConfig:
    """How neighbours are searched; see `recipe.Search`."""

    method: str
    exact_below: int
    target_recall: float
    spill_bytes: int


@dataclass(frozen=True)
class Join:
    """One search. Its answers go to `folder`, a file a chunk of queries.

    `itself`: the queries are the base, and no image finds itself. `shared`: the folder of the index
    of the base, if other searches ask in it too.
    """

    stage: str
    folder: str
    queries: VectorView
    base: VectorView
    k: int
    min_cosine: float
    itself: bool
    how: SearchConfig
    seed: int
    shared: str = ""

    @property
    def index(self) -> str:
        """Where the base lies in cells."""
        return self.shared or f"{self.folder}/index"

    @property
    def what(self) -> knn.Search:
        return knn.Search(self.k, self.min_cosine, self.itself, self.how.target_recall, self.seed)

    def path(self, kind: str, *numbers: int) -> str:
        """The table of one item of a step."""
        return f"{self.folder}/{kind}/{_name(numbers)}.parquet"

    def sent(self, kind: str, *numbers: int) -> str:
        """What one item of a step sends to those of the next."""
        return f"{self.folder}/{kind}/{_name(numbers)}.blocks"

    def sample_of_base(self, chunk: int) -> str:
        """The rows of a chunk of the base on which cells are fitted."""
        return f"{self.index}/sample/{chunk:06d}.parquet"

    def base_sent(self, chunk: int) -> str:
        """What a chunk of the base sends to the buckets."""
        return f"{self.index}/base/{chunk:06d}.blocks"

    def setup(self, name: str) -> str:
        """A file that all workers of the search read."""
        return f"{self.folder}/setup/{name}.npz"

    @property
    def cells(self) -> str:
        """The plan that the base was put in buckets by."""
        return f"{self.index}/cells.npz"


def _name(numbers: tuple[int, ...]) -> str:
    return "-".join(f"{number:06d}" for number in numbers)


Group = tuple[Part, ...]


@dataclass(frozen=True)
class Layout:
    """The parts of a search in chunks: of its queries, and of its base."""

    queries: tuple[Group, ...]
    base: tuple[Group, ...]

    def chunk_of(self, numbers: Ints) -> Ints:
        """In which chunk of queries each image number lies (n,)."""
        firsts = np.array([chunk[0].base for chunk in self.queries])
        order = np.argsort(firsts)
        chunks: Ints = order[np.searchsorted(firsts[order], numbers, side="right") - 1]
        return chunks


UNKNOWN = Reach(0.0, 0)


@dataclass(frozen=True)
class Plan:
    """Cells, the first cell of each bucket (b + 1,), and how far and in how many cells, on average,
    queries ask."""

    cells: Cells
    edges: Ints
    reach: Reach = UNKNOWN
    nprobe: float = 0.0

    def bucket_of(self, cell: Ids | Ints) -> Ints:
        buckets: Ints = np.searchsorted(self.edges, cell, side="right") - 1
        return buckets

    @property
    def buckets(self) -> int:
        return len(self.edges) - 1

    def save(self, store: Store, path: str) -> None:
        reach = {"margin": np.array(self.reach.margin), "most": np.array(self.reach.most)}
        arrays = {"centroids": self.cells.centroids, "edges": self.edges, **reach}
        save_arrays(store, path, **arrays, nprobe=np.array(self.nprobe))

    @classmethod
    def load(cls, store: Store, path: str) -> "Plan":
        have = load_arrays(store, path)
        reach = Reach(float(have["margin"]), int(have["most"]))
        return cls(Cells(have["centroids"]), have["edges"], reach, float(have["nprobe"]))


@dataclass(frozen=True)
class Sample:
    """Queries whose true neighbours in a part of the base tell how far all must ask."""

    queries: Rows
    sampling: Sampling

    def save(self, join: Join, store: Store) -> None:
        rows = {"rows": self.queries.vectors, "numbers": self.queries.numbers}
        save_arrays(store, join.setup("sample"), **rows, spread=np.array(self.sampling.spread))

    @classmethod
    def load(cls, join: Join, store: Store) -> "Sample":
        have = load_arrays(store, join.setup("sample"))
        sampling = Sampling(len(have["rows"]), int(have["spread"]))
        return cls(Rows(have["rows"], have["numbers"]), sampling)

    def truth(self, join: Join, base: Rows, chunk: int) -> Neighbours:
        """The true neighbours (n, k) in the part of a chunk of the base that they are compared
        with."""
        part = self.sampling.part(base, np.random.default_rng([join.seed, chunk]))
        return knn.exact(self.queries, [part], self.sampling.asked(join.what))


def save_arrays(store: Store, path: str, **arrays: Any) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    store.write(path, buffer.getvalue())


def load_arrays(store: Store, path: str) -> dict[str, Any]:
    with np.load(io.BytesIO(store.read(path))) as arrays:
        return dict(arrays)
