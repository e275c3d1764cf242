"""Draws from the pool's clusters: for all sets in one pass over the pool.

`retrieve/draws/hits/*`       how many images of a curated part are nearest to each centroid
`retrieve/draws/candidates/*` of a chunk of pool parts, the images that any set may draw
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.algorithms.assign import assign
from curation.algorithms.sampling import Ints, draw_by_cluster, priorities
from curation.runtime.executor import Counts, Item, MakeWorker, Work, map_parts, require_all
from curation.runtime.manifest import fingerprint
from curation.runtime.store import Store, delete_all, open_store, read_table, write_table
from curation.schema import ASSIGNMENTS
from curation.stages.cluster import assignments_path
from curation.stages.cluster_tables import read_centroids
from curation.stages.modes import Choices, ClusterDrawConfig, Task, id_words
from curation.stages.neighbour_index import Crew
from curation.stages.neighbours import chunks
from curation.stages.tables import Part, VectorView, column_numpy, ids_of, overlapped, read_parts

FOLDER = "retrieve/draws"
CHUNK_IMAGES = 1 << 20  # of the parts that one worker looks through
WORD = pa.field("word", pa.uint64())
DRAWN = ASSIGNMENTS.append(pa.field("priority", pa.uint64()))


@dataclass(frozen=True)
class Quota:
    """Images that a set may draw: of each cluster (k,), and in all."""

    task: Task
    how: str
    per_cluster: Ints
    cap: int
    facts: dict[str, Any]

    @property
    def seed(self) -> int:
        """Each set draws for itself."""
        return int(fingerprint(self.task.cfg.seed, self.task.set)[:15], 16)


def by_cluster(wanted: Sequence[tuple[Task, ClusterDrawConfig]], crew: Crew) -> list[Quota]:
    """`per_cluster` of every cluster that holds at least `min_queries` images of the set."""
    items = [Item(_hits_path(p), p.rows, p) for task, _ in wanted for p in task.parts]
    if wanted:
        _publish(crew, items, partial(HitsWorker, wanted[0][0].view, crew.store.uri))
    quotas = []
    for task, one in wanted:
        paths = [_hits_path(part) for part in task.parts]
        tables = overlapped(paths, partial(read_table, crew.store))
        hits = np.sum([column_numpy(table, "images") for _, table in tables], axis=0)
        eligible = hits >= one.min_queries
        facts = {"queries": int(hits.sum()), "clusters": int(eligible.sum())}
        per_cluster = np.where(eligible, one.per_cluster, 0)
        quotas.append(Quota(task, "cluster", per_cluster, one.cap, facts))
    return quotas


def draw(quotas: Sequence[Quota], crew: Crew) -> list[Choices]:
    """What each set draws at random, in the order of the images.

    It depends on the images alone, not on their order. Memory: 24 bytes for each of twice the
    images drawn, 90 while those of one set are cut.
    """
    if not quotas:
        return []
    groups = chunks(read_parts(crew.store, "pool"), CHUNK_IMAGES)
    items = []
    for number, group in enumerate(groups):
        path = f"{FOLDER}/candidates/{number:06d}.parquet"
        items.append(Item(path, sum(part.rows for part in group), (path, group)))
    wanted = np.any([quota.per_cluster > 0 for quota in quotas], axis=0)
    _publish(crew, items, partial(CandidatesWorker, quotas[0].task.view, crew.store.uri, wanted))
    draws = [Draw(quota) for quota in quotas]
    for _, table in overlapped([item.name for item in items], partial(read_table, crew.store)):
        for one in draws:
            one.offer(table)
    return [one.choices() for one in draws]


def clear(store: Store) -> None:
    """Deletes what only the draws needed."""
    delete_all(store, [entry.path for entry in store.list(FOLDER)])


def _publish(crew: Crew, items: Sequence[Item], make: MakeWorker) -> None:
    have = {entry.path for entry in crew.store.list(FOLDER)}
    work = Work("retrieve", items, lambda item: item.name in have, make)
    require_all(map_parts(work, crew.executor, crew.events), "retrieve")


class Draw:
    """The lowest priorities among the candidates offered so far, within the quota."""

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self._most = 2 * min(int(quota.per_cluster.sum()), quota.cap)
        self._blocks, self._held = [DRAWN.empty_table()], 0

    def offer(self, table: pa.Table) -> None:
        """Candidates, with the first word of their ids."""
        quota = self._quota
        table = table.filter(pa.array(quota.per_cluster[table["cluster"].to_numpy()] > 0))
        priority = pa.array(priorities(table["word"].to_numpy(), quota.seed))
        self._blocks.append(table.drop_columns("word").append_column("priority", priority))
        self._held += len(table)
        if self._held > self._most:
            self._blocks = [self._drawn()]
            self._held = len(self._blocks[0])

    def choices(self) -> Choices:
        """What is drawn."""
        drawn, quota = self._drawn(), self._quota
        image, cosine = column_numpy(drawn, "image"), drawn["cosine"].to_numpy()
        none = np.full(len(drawn), -1)
        ways = column_numpy(drawn, "cluster") if quota.how == "cluster" else None
        return Choices(quota.task.set, quota.how, image, none, cosine, ways, quota.facts)

    def _drawn(self) -> pa.Table:
        table, quota = pa.concat_tables(self._blocks), self._quota
        cluster, priority = column_numpy(table, "cluster"), table["priority"].to_numpy()
        keep = draw_by_cluster(cluster, priority, quota.per_cluster, quota.cap)
        return table.take(pa.array(keep)).combine_chunks()


class CandidatesWorker:
    """Publishes the images of some parts that lie in `wanted` clusters (k,)."""

    def __init__(self, view: VectorView, run_uri: str, wanted: npt.NDArray[np.bool_]) -> None:
        self._view, self._store, self._wanted = view, open_store(run_uri), wanted

    def __call__(self, item: tuple[str, Sequence[Part]]) -> Counts:
        path, parts = item
        found = pa.concat_tables(table for _, table in overlapped(parts, self._of))
        write_table(self._store, path, found)
        return {"images": len(found)}

    def _of(self, part: Part) -> pa.Table:
        table = read_table(self._store, assignments_path(part))
        table = table.filter(pa.array(self._wanted[table["cluster"].to_numpy()]))
        ids = ids_of(self._store, self._view.embedded, [part], column_numpy(table, "image"))
        return table.append_column(WORD, pa.array(id_words(ids)))


def _hits_path(part: Part) -> str:
    return f"{FOLDER}/hits/{part.part:06d}.parquet"


class HitsWorker:
    """Holds the centroids; counts the images of one curated part a call."""

    def __init__(self, view: VectorView, run_uri: str) -> None:
        self._view, self._store = view, open_store(run_uri)
        self._centroids = read_centroids(self._store)

    def __call__(self, part: Part) -> Counts:
        rows = self._view.load(self._store, part)[1]
        nearest, _ = assign(rows, self._centroids)
        images = np.bincount(nearest, minlength=len(self._centroids))
        write_table(self._store, _hits_path(part), pa.table({"images": images}))
        return {"images": len(rows)}
