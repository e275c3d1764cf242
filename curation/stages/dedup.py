"""Copy vectors -> what stays of each part: near-duplicate groups, and everything near the holdout.

DINOv2, app. A.3: neighbours above a cosine join into components; one image a component stays; a
component that holds an evaluation image goes whole. The union-find runs in this process:
about 70 bytes an image and 90 more for one with copies (docs/memory.md), and the edges of giants.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curation.algorithms.components import Components, Floats, Ints, split_giants
from curation.runtime.events import Events
from curation.runtime.executor import Executor, timer
from curation.runtime.manifest import StageReport, begin, finish
from curation.runtime.store import Store, read_table, write_table
from curation.schema import DECISIONS
from curation.stages.neighbours import Join, answers, search
from curation.stages.tables import (
    EXACT_TABLE,
    Embedded,
    Part,
    VectorView,
    by_part,
    column_bytes,
    column_numpy,
    decisions_path,
    ids_of,
    read_parts,
    usable_images,
)


@dataclass(frozen=True)
class DedupConfig:
    """Thresholds are cosines of the copy descriptor; k neighbours an image."""

    embedding: str
    k: int
    min_cosine: float
    holdout_min_cosine: float
    max_component: int
    exact_below: int
    target_recall: float
    seed: int


@dataclass
class Groups:
    """By image number: component label (n,), best link (n,), nearest holdout image or -1 (n,)."""

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
    links = []
    if holdout := read_parts(store, "holdout"):
        view = VectorView(embedded, "copy")
        near = _join(cfg, "holdout", view, 1, cfg.holdout_min_cosine)
        seekers = read_parts(store, "curated", "pool")
        counts["holdout_search"] = search(near, seekers, holdout, store, executor, events)
        links = list(answers(near, store))
    parts = read_parts(store)
    groups, giants = _group(cfg, own, links, parts, store)
    counts |= _write_decisions(groups, parts, embedded, store)
    sizes = np.bincount(groups.labels)
    spread = np.unique(sizes[sizes > 1], return_counts=True)
    counts["component_sizes"] = {str(s): int(c) for s, c in zip(*spread, strict=True)}
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
        exact_below=cfg.exact_below,
        target_recall=cfg.target_recall,
        seed=cfg.seed,
    )


def _group(
    cfg: DedupConfig, own: Join, links: list[pa.Table], parts: list[Part], store: Store
) -> tuple[Groups, list[tuple[int, int]]]:
    """Components over copies and near-copies, giants cut, then joined to the holdout."""
    images = parts[-1].base + parts[-1].rows
    components, best = Components(images), np.zeros(images, np.float32)
    exact = read_table(store, EXACT_TABLE)
    copy, first = column_numpy(exact, "image"), column_numpy(exact, "first")
    components.add(copy, first)
    best[copy] = best[first] = 1.0
    for table in answers(own, store):
        left, right, cosine = _edges(table)
        components.add(left, right)
        np.maximum.at(best, left, cosine)
        np.maximum.at(best, right, cosine)
    labels = components.labels()
    giants: list[tuple[int, int]] = []
    sizes = np.bincount(labels, minlength=images)
    if sizes.max() > cfg.max_component:
        inside = [(copy, first, np.ones(len(copy), np.float32))]
        inside += [_edges(table) for table in answers(own, store)]
        big = [_within(sizes[labels] > cfg.max_component, *edges) for edges in inside]
        left, right, cosine = (np.concatenate(column) for column in zip(*big, strict=True))
        labels, giants = split_giants(labels, left, right, cosine, cfg.max_component)
    holdout = np.full(images, -1)
    joined = Components(images)
    joined.add(np.arange(images), labels)
    for table in links:
        left, right, cosine = _edges(table)
        joined.add(left, right)
        holdout[left] = right
        best[left] = cosine
    return Groups(joined.labels(), best, holdout), giants


def _edges(table: pa.Table) -> tuple[Ints, Ints, Floats]:
    cosine = table["cosine"].to_numpy()
    return column_numpy(table, "query"), column_numpy(table, "image"), cosine


def _within(chosen: Any, left: Ints, right: Ints, cosine: Floats) -> tuple[Ints, Ints, Floats]:
    mask = chosen[left]
    return left[mask], right[mask], cosine[mask]


def _write_decisions(
    groups: Groups, parts: list[Part], embedded: Embedded, store: Store
) -> dict[str, Any]:
    """One decision an image: of each group the representative stays, unless the holdout is near."""
    images = len(groups.labels)
    sizes = np.bincount(groups.labels, minlength=images)
    tainted = np.zeros(images, bool)  # by label: the group reaches the holdout
    near = groups.holdout >= 0
    tainted[groups.labels[near]] = True
    stays = _representatives(groups.labels, sizes, parts, embedded, store)
    other = np.where(near, groups.holdout, stays[groups.labels])
    other[(other == np.arange(images)) | (tainted[groups.labels] & ~near)] = -1
    pointing = np.flatnonzero(other >= 0)
    other_ids = ids_of(store, embedded, parts, other[pointing])
    counts = {"kept": 0, "duplicate": 0, "near_holdout": 0}
    for part in parts:
        block = slice(part.base, part.base + part.rows)
        label = groups.labels[block]
        usable = usable_images(store, embedded, part)
        decision = np.full(part.rows, "kept", object)
        if part.role == "pool":
            decision[stays[label] != np.arange(block.start, block.stop)] = "duplicate"
        decision[tainted[label] | (part.role == "holdout")] = "near_holdout"
        decision[~usable] = "rejected"
        if part.role == "pool":
            for name in counts:
                counts[name] += int((decision == name).sum())
        ids = np.full(part.rows, None, object)
        start, stop = np.searchsorted(pointing, [block.start, block.stop])
        for at in range(start, stop):
            ids[pointing[at] - part.base] = other_ids[at].tobytes()
        component = pa.array(label, mask=~(usable & (sizes[label] > 1)))
        columns = [pa.array(decision), component, pa.array(ids, pa.binary(32))]
        columns.append(pa.array(groups.cosine[block]))
        table = pa.Table.from_arrays(columns, schema=DECISIONS)
        write_table(store, decisions_path(part), table)
    return counts


def _representatives(
    labels: Ints, sizes: Ints, parts: list[Part], embedded: Embedded, store: Store
) -> Ints:
    """By label, the pool image that stays: most pixels, then smallest id. Alone: itself."""
    stays = np.arange(len(labels))
    grouped = np.flatnonzero(sizes[labels] > 1)
    numbers, pixels, words = [], [], []
    pool = [part for part in parts if part.role == "pool"]
    for part, block in by_part(pool, grouped):
        rows = grouped[block] - part.base
        rows = rows[usable_images(store, embedded, part)[rows]]
        table = read_table(store, embedded.images_path(part), ["id", "width", "height"]).take(rows)
        numbers.append(part.base + rows)
        pixels.append(column_numpy(table, "width") * column_numpy(table, "height"))
        words.append(column_bytes(table, "id").view(">u8"))
    if not numbers:
        return stays
    number, pixel, word = np.concatenate(numbers), np.concatenate(pixels), np.concatenate(words)
    label = labels[number]
    order = np.lexsort((number, *word.T[::-1], -pixel, label))
    first = np.r_[True, label[order][1:] != label[order][:-1]]
    stays[label[order][first]] = number[order][first]
    return stays
