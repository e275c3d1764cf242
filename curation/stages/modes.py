"""How each mode of a curated set chooses images.

DINOv2, app. A.4: a set is taken as it is, by the nearest neighbours of each of its images, or by
draws from the clusters that hold enough of them (`draws.py`). `hierarchical.py` balances those.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from curation.algorithms.sampling import Floats, Ints, Words, backfill
from curation.runtime.store import Store
from curation.stages.neighbour_index import Crew
from curation.stages.neighbour_plan import Join, SearchConfig
from curation.stages.neighbours import answers, search_all
from curation.stages.tables import Embedded, Part, VectorView, column_numpy, read_parts


@dataclass(frozen=True)
class SampleConfig:
    """See `recipe_modes.Sample`."""

    k: int
    collisions: str


@dataclass(frozen=True)
class ClusterDrawConfig:
    """See `recipe_modes.ClusterDraw`."""

    per_cluster: int
    min_queries: int
    cap: int


@dataclass(frozen=True)
class HierarchicalConfig:
    """`counts` are the clusters of the levels above the first; see `recipe_modes.Hierarchical`."""

    counts: tuple[int, ...]
    target_size: int


@dataclass(frozen=True)
class SetConfig:
    """How one curated set is used: the modes of its `retrieve` list."""

    name: str
    as_is: bool
    sample: SampleConfig | None
    cluster: ClusterDrawConfig | None
    hierarchical: HierarchicalConfig | None


@dataclass(frozen=True)
class RetrieveConfig:
    """All curated sets in order, and how neighbours are searched."""

    embedding: str
    sets: tuple[SetConfig, ...]
    search: SearchConfig
    seed: int


@dataclass
class Choices:
    """Chosen images, a row each: number, query's number or -1, how, cosine (NaN: none)."""

    set: str
    how: str
    image: Ints
    query: Ints
    cosine: Floats
    cluster: Ints | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One set for which a mode is to choose images."""

    cfg: RetrieveConfig
    set: str
    store: Store

    @property
    def view(self) -> VectorView:
        return VectorView(Embedded(self.cfg.embedding), "semantic", "kept")

    @property
    def parts(self) -> list[Part]:
        """The parts of the set itself."""
        return [part for part in read_parts(self.store, "curated") if part.set == self.set]


def as_is(task: Task) -> Choices:
    """All kept images of the set."""
    view, store = task.view, task.store
    numbers = np.concatenate([view.load(store, part)[0] for part in task.parts])
    nothing = np.full(len(numbers), np.nan, np.float32)
    return Choices(task.set, "as_is", numbers, np.full(len(numbers), -1), nothing)


def sample(wanted: Sequence[tuple[Task, SampleConfig]], crew: Crew) -> dict[str, Choices]:
    """By set: k nearest pool images of each query; with `backfill` k that no other query has.

    Sets are searched for together: the pool is put in cells once.
    """
    found: dict[str, Choices] = {}
    pool = read_parts(crew.store, "pool")
    most = sum(part.rows for part in pool)
    todo, attempt = [(task, one, one.k) for task, one in wanted], 0
    while todo:
        joins = [_join(task, depth, attempt) for task, _, depth in todo]
        searches = [(join, task.parts) for join, (task, _, _) in zip(joins, todo, strict=True)]
        deeper = []
        for facts, join, (task, one, depth) in zip(
            search_all(searches, pool, crew), joins, todo, strict=True
        ):
            choices = _nearest(task, one, join, last=depth >= most)
            if choices is None:
                deeper.append((task, one, min(2 * depth, most)))
            else:
                choices.facts = facts | choices.facts
                found[task.set] = choices
        todo, attempt = deeper, attempt + 1
    return found


def _join(task: Task, depth: int, attempt: int) -> Join:
    return Join(
        stage="retrieve",
        folder=f"retrieve/neighbours/{task.set}/k{depth}",
        queries=task.view,
        base=task.view,
        k=depth,
        min_cosine=-2.0,
        itself=False,
        how=task.cfg.search,
        seed=task.cfg.seed,
        shared=f"retrieve/index/{attempt}",
    )


def _nearest(task: Task, one: SampleConfig, join: Join, last: bool) -> Choices | None:
    """What a set's queries have found; None if they need more neighbours and can have them."""
    table = pa.concat_tables(answers(join, task.store))
    query, image = column_numpy(table, "query"), column_numpy(table, "image")
    cosine = table["cosine"].to_numpy()
    queries = len(np.unique(query))
    if one.collisions == "backfill":
        taken = _backfill(query, image, cosine, one.k)
        if taken.sum() < one.k * queries and not last:
            return None
        query, image, cosine = query[taken], image[taken], cosine[taken]
    facts = {"queries": queries, "asked": one.k * queries}
    facts["collisions"] = len(image) - len(np.unique(image))
    facts["missing"] = one.k * queries - len(image)
    return Choices(task.set, "sample", image, query, cosine, facts=facts)


def _backfill(query: Ints, image: Ints, cosine: Floats, k: int) -> Any:
    """`sampling.backfill` over (query, image, cosine) rows that are grouped by query."""
    starts = np.flatnonzero(np.r_[True, query[1:] != query[:-1]])
    counts = np.diff(np.r_[starts, len(query)])
    row = np.repeat(np.arange(len(starts)), counts)
    column = np.arange(len(query)) - np.repeat(starts, counts)
    numbers = np.full((len(starts), counts.max(initial=0)), -1)
    cosines = np.full(numbers.shape, -np.inf, np.float32)
    numbers[row, column], cosines[row, column] = image, cosine
    return backfill(cosines, numbers, k)[row, column]


def id_words(ids: Any) -> Words:
    """The first 8 bytes of ids (n, 32) as uint64."""
    words: Words = np.ascontiguousarray(ids[:, :8]).view(">u8")[:, 0].astype(np.uint64)
    return words
