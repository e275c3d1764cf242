"""Images whose perceptual hashes are near, over the whole pool, and which of them would stay."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.algorithms.components import Components, component_sizes
from curation.algorithms.components import Ints as Nodes
from curation.algorithms.hamming import Hashes, Ints, near_pairs, stays_for
from curation.runtime.store import Store, read_table, write_table
from curation.schema import PHASH
from curation.stages.tables import (
    EXACT_TABLE,
    PHASH_TABLE,
    Embedded,
    Part,
    column_bytes,
    column_numpy,
    overlapped,
    read_parts,
)


def perceptual_duplicates(store: Store, embedded: Embedded, bits: int) -> int:
    """Writes the pool images that lie at most `bits` from a better one that stays; how many.

    Better is what dedup keeps: more pixels, then the smaller id, then the smaller number. Of
    several that stay the nearest counts, and nothing is linked through others. Copies of the same
    bytes are left out. Memory: 30 bytes a pool image, and 120 one that has others near.
    """
    pool = read_parts(store, "pool")
    near = _near(store, embedded, pool, bits)
    order = np.lexsort((near.image, *near.ids.view(">u8").T[::-1], -near.pixels, near.group))
    stays, apart = stays_for(near.hash[order], near.group[order], bits)
    copies = np.flatnonzero(stays != np.arange(len(order)))
    copies = copies[np.argsort(near.image[order[copies]])]
    kept = order[stays[copies]]
    ids = [None, pa.py_buffer(near.ids[kept].tobytes())]
    columns = [
        pa.array(near.image[order[copies]]),
        pa.array(near.image[kept]),
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(kept), ids),
        pa.array(apart[copies].astype(np.int32)),
    ]
    write_table(store, PHASH_TABLE, pa.Table.from_arrays(columns, schema=PHASH))
    return len(copies)


@dataclass(frozen=True)
class Near:
    """Images with others near, directly or through others: number, hash, component, pixels (n,),
    ids (n, 32)."""

    image: Ints
    hash: Hashes
    group: Ints
    pixels: Ints
    ids: npt.NDArray[np.uint8]


def _near(store: Store, embedded: Embedded, pool: list[Part], bits: int) -> Near:
    first, hashes = pool[0].base, _hashes(store, embedded, pool)
    distinct, component, grouped = _components(hashes, bits)
    rows: dict[Part, Ints] = {}
    nodes: dict[Part, Ints] = {}
    for part in pool:
        mine = hashes[part.base - first :][: part.rows]
        row = np.flatnonzero(mine)
        node = np.searchsorted(distinct, mine[row])
        if grouped[node].any():
            rows[part], nodes[part] = row[grouped[node]], node[grouped[node]]
    pixels, ids = [np.empty(0, np.int64)], [np.empty((0, 32), np.uint8)]
    for part, table in overlapped(
        list(rows),
        lambda part: read_table(store, embedded.images_path(part), ["id", "width", "height"]),
    ):
        table = table.take(pa.array(rows[part]))
        pixels.append(column_numpy(table, "width") * column_numpy(table, "height"))
        ids.append(column_bytes(table, "id"))
    empty = np.empty(0, np.int64)
    image = np.concatenate([empty, *(part.base + rows[part] for part in rows)])
    node = np.concatenate([empty, *nodes.values()])
    return Near(
        image,
        distinct[node],
        component[node].astype(np.int64),
        np.concatenate(pixels),
        np.concatenate(ids),
    )


def _hashes(store: Store, embedded: Embedded, pool: list[Part]) -> Hashes:
    """The hash of each pool image (n,); 0, which none has, where there is nothing to compare."""
    first = pool[0].base
    hashes = np.zeros(pool[-1].base + pool[-1].rows - first, np.uint64)
    for part, table in overlapped(
        pool, lambda part: read_table(store, embedded.images_path(part), ["phash", "fault"])
    ):
        usable = table["fault"].is_null().to_numpy()
        hashes[part.base - first :][: part.rows] = table["phash"].fill_null(0).to_numpy() * usable
    hashes[column_numpy(read_table(store, EXACT_TABLE, ["image"]), "image") - first] = 0
    return hashes


def _components(hashes: Hashes, bits: int) -> tuple[Hashes, Nodes, npt.NDArray[np.bool_]]:
    """The different hashes (d,), rising, their components, and which are of several images."""
    ordered = np.sort(hashes[hashes != 0])
    new = np.ones(len(ordered), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    distinct = ordered[new]
    repeated = np.zeros(len(distinct), bool)
    repeated[np.searchsorted(distinct, ordered[~new])] = True
    del ordered, new
    components = Components(len(distinct))
    for left, right in near_pairs(distinct, bits):
        components.add(left, right)
    label = components.labels()
    return distinct, label, repeated | (component_sizes(label)[label] > 1)
