"""Kept pool -> the sample that centroids are fitted on, in slices that a worker can hold.

`cluster/fit/000/sample/*` the vectors of each slice, unless the sample is the whole pool
"""

from functools import partial

import numpy as np

from curation.algorithms.products import Ints
from curation.runtime.executor import Counts, Item
from curation.runtime.store import open_store, write_table
from curation.stages.cluster_tables import ClusterConfig, Fitting, Slice, slice_table
from curation.stages.tables import Part, overlapped, read_decisions

SLICE_ROWS = 131_072
Draw = tuple[Part, int]  # a part and how many of its kept images are drawn


def draw(fitting: Fitting, pool: list[Part]) -> list[Slice]:
    """The slices, published; none if no image is kept."""
    cfg, kept = fitting.cfg, []
    for _, table in overlapped(pool, partial(read_decisions, fitting.store)):
        decisions = table["decision"].to_numpy(zero_copy_only=False)
        kept.append(int((decisions == "kept").sum()))
    wanted = cfg.k * cfg.sample_per_centroid or sum(kept)
    drawn = shares(np.array(kept, np.int64), wanted, np.random.default_rng([cfg.seed, 1]))
    slices: list[Slice] = []
    items, start, whole = [], 0, wanted >= sum(kept)
    for number, draws in enumerate(_cut(pool, drawn)):
        rows = sum(count for _, count in draws)
        parts = tuple(part for part, _ in draws) if whole else ()
        one = Slice(0, number, start, rows, parts)
        slices.append(one)
        items.append(Item(one.path, rows, (one, draws)))
        start += rows
    if not whole:
        fitting.publish(items, partial(DrawWorker, cfg, fitting.store.uri))
    return slices


def _cut(pool: list[Part], drawn: Ints) -> list[list[Draw]]:
    """Consecutive parts with draws; the cuts don't depend on who does the work."""
    cuts: list[list[Draw]] = []
    have = SLICE_ROWS
    for part, count in zip(pool, drawn.tolist(), strict=True):
        if not count:
            continue
        if have >= SLICE_ROWS:
            cuts.append([])
            have = 0
        cuts[-1].append((part, count))
        have += count
    return cuts


def shares(kept: Ints, wanted: int, rng: np.random.Generator) -> Ints:
    """How many images to draw of each part (p,) of `kept` (p,) images: `wanted` in all.

    Systematic sampling: each image has the same chance, and no part more than one image too many.
    """
    ends = np.cumsum(kept)
    total = int(ends[-1]) if len(ends) else 0
    if wanted >= total:
        return kept
    upto = (ends * wanted + rng.integers(total)) // total
    return np.diff(upto, prepend=0)


class DrawWorker:
    """Draws the rows of one slice a call; each part has draws of its own."""

    def __init__(self, cfg: ClusterConfig, run_uri: str) -> None:
        self._cfg, self._store = cfg, open_store(run_uri)

    def __call__(self, item: tuple[Slice, list[Draw]]) -> Counts:
        one, draws = item
        found = []
        for part, count in draws:
            _, rows = self._cfg.view.load(self._store, part)
            rng = np.random.default_rng([self._cfg.seed, 1, part.part])
            found.append(rows[np.sort(rng.choice(len(rows), count, replace=False))])
        write_table(self._store, one.path, slice_table(np.concatenate(found)))
        return {"images": one.rows}
