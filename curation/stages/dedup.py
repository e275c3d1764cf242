"""Copy vectors -> what stays of each part: near-duplicate groups, and everything near the holdout.

DINOv2, app. A.3: neighbours above a cosine join into components; one image a component stays; a
component that holds an evaluation image goes whole. The union-find runs in this process, over
edges read block by block: 17 bytes an image and 44 a group of copies (docs/memory.md).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curation.algorithms.components import (
    Components,
    Edges,
    Floats,
    Ints,
    Representatives,
    component_sizes,
    nobody,
    split_giants,
)
from curation.runtime.events import Events
from curation.runtime.executor import Executor, timer
from curation.runtime.manifest import StageReport, begin, finish
from curation.runtime.store import Store, read_table, write_table
from curation.schema import DECISIONS
from curation.stages.neighbour_plan import Join, SearchConfig
from curation.stages.neighbours import answers, search
from curation.stages.tables import (
    EXACT_TABLE,
    PHASH_TABLE,
    Embedded,
    Part,
    VectorView,
    column_bytes,
    column_numpy,
    decisions_path,
    ids_of,
    overlapped,
    read_parts,
    usable_images,
)

BLOCK_IMAGES = 1 << 24  # images looked at together where no part sets the size


@dataclass(frozen=True)
class DedupConfig:
    """Thresholds are cosines of the copy descriptor; k neighbours an image.

    `phash`: images whose perceptual hashes are near are duplicates too.
    """

    embedding: str
    k: int
    min_cosine: float
    holdout_min_cosine: float
    max_component: int
    search: SearchConfig
    seed: int
    phash: bool = False


@dataclass(frozen=True)
class Groups:
    """By image number (n,): component label, best link, nearest holdout image or `nobody`."""

    labels: Ints
    cosine: Floats
    holdout: Ints


def run(
    cfg: DedupConfig, stage_fingerprint: str, store: Store, executor: Executor, events: Events
) -> StageReport:
    """Copy vectors -> `dedup/decisions/*.parquet`, row-aligned with the images of each part."""
    elapsed = timer()
    begin(store, "dedup", stage_fingerprint)
    embedded = Embedded(cfg.embedding)
    own = _join(cfg, "self", VectorView(embedded, "copy", "distinct"), cfg.k, cfg.min_cosine)
    pool = read_parts(store, "pool")
    counts: dict[str, Any] = {"search": search(own, pool, pool, store, executor, events)}
    near = None
    if holdout := read_parts(store, "holdout"):
        view = VectorView(embedded, "copy")
        near = _join(cfg, "holdout", view, 1, cfg.holdout_min_cosine)
        seekers = read_parts(store, "curated", "pool")
        counts["holdout_search"] = search(near, seekers, holdout, store, executor, events)
    parts = read_parts(store)
    groups, giants = _group(cfg, own, near, parts, store)
    sizes = component_sizes(groups.labels)
    spread = _spread(sizes)
    counts |= _write_decisions(groups, Representatives(sizes), parts, embedded, store)
    counts["component_sizes"] = {str(size): count for size, count in spread}
    counts["giants"] = [{"size": size, "largest_piece": piece} for size, piece in giants]
    counts["min_cosine"] = cfg.min_cosine
    counts["holdout_min_cosine"] = cfg.holdout_min_cosine
    return finish(store, StageReport("dedup", stage_fingerprint, counts, elapsed()))


def _join(cfg: DedupConfig, name: str, view: VectorView, k: int, min_cosine: float) -> Join:
    return Join(
        stage="dedup",
        folder=f"dedup/{name}",
        queries=view,
        base=view,
        k=k,
        min_cosine=min_cosine,
        itself=name == "self",
        how=cfg.search,
        seed=cfg.seed,
    )


def _group(
    cfg: DedupConfig, own: Join, near: Join | None, parts: list[Part], store: Store
) -> tuple[Groups, list[tuple[int, int]]]:
    """Components over copies and near-copies, giants cut, then joined to the holdout."""
    images = parts[-1].base + parts[-1].rows
    components, best = Components(images), np.zeros(images, np.float32)
    for left, right, cosine in _links(own, store):
        components.add(left, right)
        np.maximum.at(best, left, cosine)
        np.maximum.at(best, right, cosine)
    for left, right, _ in _near_hashes(cfg, store):
        components.add(left, right)
    labels = components.labels()
    giants = split_giants(
        labels, lambda: chain(_links(own, store), _near_hashes(cfg, store)), cfg.max_component
    )
    holdout = np.full_like(labels, nobody(labels))
    for table in answers(near, store) if near else ():
        left, right, cosine = _edges(table)
        components.add(left, right)
        holdout[left] = right
        best[left] = cosine
    return Groups(components.labels(), best, holdout), giants


def _links(own: Join, store: Store) -> Iterator[Edges]:
    """Every pair of copies: those with the same bytes, then the answers of the search."""
    yield from _sure(EXACT_TABLE, "first", store)
    for table in answers(own, store):
        yield _edges(table)


def _near_hashes(cfg: DedupConfig, store: Store) -> Iterator[Edges]:
    """Each image with the better one that its perceptual hash is near, if those are dropped."""
    if cfg.phash:
        yield from _sure(PHASH_TABLE, "kept", store)


def _sure(path: str, other: str, store: Store) -> Iterator[Edges]:
    """Pairs that no cut of a giant parts."""
    with store.open(path) as file:
        for batch in pq.ParquetFile(file).iter_batches(columns=["image", other]):
            image = batch["image"].to_numpy()
            yield image, batch[other].to_numpy(), np.ones(len(image), np.float32)


def _edges(table: pa.Table) -> Edges:
    return table["query"].to_numpy(), table["image"].to_numpy(), table["cosine"].to_numpy()


def _spread(sizes: Ints) -> list[tuple[int, int]]:
    """How many components have each size above one, by size."""
    found = Counter[int]()
    for start in range(0, len(sizes), BLOCK_IMAGES):
        block = sizes[start : start + BLOCK_IMAGES]
        for size, count in zip(*np.unique(block[block > 1], return_counts=True), strict=True):
            found[int(size)] += int(count)
    return sorted(found.items())


def _write_decisions(
    groups: Groups, best: Representatives, parts: list[Part], embedded: Embedded, store: Store
) -> dict[str, Any]:
    """One decision an image: of each group the representative stays, unless the holdout is near."""
    _offer_copies(groups, best, parts, embedded, store)
    verdicts = Verdicts(groups, best, _tainted(groups), *_holdout_ids(parts, embedded, store))
    counts = {"kept": 0, "duplicate": 0, "near_holdout": 0}

    def decide(part: Part) -> Counter[str]:
        table = verdicts.of(part, usable_images(store, embedded, part))
        write_table(store, decisions_path(part), table)
        return Counter(table["decision"].to_pylist())

    for part, found in overlapped(parts, decide):
        if part.role == "pool":
            counts = {name: count + found[name] for name, count in counts.items()}
    return counts


def _offer_copies(
    groups: Groups, best: Representatives, parts: list[Part], embedded: Embedded, store: Store
) -> None:
    """Every usable pool image may stay for its group; one that is alone costs nothing."""

    def read(part: Part) -> tuple[Ints, pa.Table] | None:
        label = groups.labels[part.base : part.base + part.rows]
        if not (grouped := best.grouped(label)).any():
            return None
        rows = np.flatnonzero(grouped & usable_images(store, embedded, part))
        table = read_table(store, embedded.images_path(part), ["id", "width", "height"])
        return rows, table.take(rows)

    for part, found in overlapped([part for part in parts if part.role == "pool"], read):
        if found is None:
            continue
        rows, table = found
        pixels = column_numpy(table, "width") * column_numpy(table, "height")
        images = part.base + rows
        best.offer(images, groups.labels[images], pixels, column_bytes(table, "id"))


def _tainted(groups: Groups) -> npt.NDArray[np.bool_]:
    """By label: does the group reach the holdout?"""
    tainted = np.zeros(len(groups.labels), bool)
    for start in range(0, len(tainted), BLOCK_IMAGES):
        block = slice(start, start + BLOCK_IMAGES)
        holdout = groups.holdout[block]
        tainted[groups.labels[block][holdout != nobody(holdout)]] = True
    return tainted


def _holdout_ids(
    parts: list[Part], embedded: Embedded, store: Store
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Numbers (h,), rising, and ids (h, 32) of all holdout images."""
    holdout = [part for part in parts if part.role == "holdout"]
    numbers = [np.arange(part.base, part.base + part.rows) for part in holdout]
    number = np.concatenate([*numbers, np.empty(0, np.int64)])
    return number, ids_of(store, embedded, holdout, number)


@dataclass(frozen=True)
class Verdicts:
    """All that decides: by label whether the holdout is near (n,), holdout numbers and ids."""

    groups: Groups
    best: Representatives
    tainted: npt.NDArray[np.bool_]
    held_number: npt.NDArray[np.int64]
    held_id: npt.NDArray[np.uint8]

    def of(self, part: Part, usable: npt.NDArray[np.bool_]) -> pa.Table:
        """The decisions of a part; `usable` (rows,) as its images are."""
        block = slice(part.base, part.base + part.rows)
        label, holdout = self.groups.labels[block], self.groups.holdout[block]
        grouped, tainted = self.best.grouped(label), self.tainted[label]
        copy = np.zeros(part.rows, bool)
        stays, _ = self.best.of(label[grouped])
        copy[grouped] = stays != part.base + np.flatnonzero(grouped)
        decision = np.full(part.rows, "kept", object)
        if part.role == "pool":
            decision[copy] = "duplicate"
        decision[tainted | (part.role == "holdout")] = "near_holdout"
        decision[~usable] = "rejected"
        ids = np.full(part.rows, None, object)
        pointing = np.flatnonzero(copy & ~tainted)
        _, stays_id = self.best.of(label[pointing])
        near = np.flatnonzero(holdout != nobody(holdout))
        holdout_id = self.held_id[np.searchsorted(self.held_number, holdout[near])]
        for rows, found in ((pointing, stays_id), (near, holdout_id)):
            ids[rows] = [id_.tobytes() for id_ in found]
        component = pa.array(label.astype(np.int64), mask=~(usable & grouped))
        columns = [pa.array(decision), component, pa.array(ids, pa.binary(32))]
        columns.append(pa.array(self.groups.cosine[block]))
        return pa.Table.from_arrays(columns, schema=DECISIONS)
