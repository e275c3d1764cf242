"""Lineage -> tables that find images by id, by duplicate group and by the query that brought them.

A run of 142 million rows is then asked for one image in a few small reads. Each file covers the
parts of some millions of images and is sorted: nothing is merged, so that memory stays bounded.
"""

from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from curation.runtime.events import Events
from curation.runtime.executor import Counts, Executor, Item, Work, map_parts, require_all
from curation.runtime.store import Store, open_store, read_table, write_table
from curation.schema import LOOKUP, LOOKUPS, lineage_path, lookup_folder
from curation.stages.tables import Part

GROUP_IMAGES = 4_000_000  # of one file: 64 MB, and thrice that while it is sorted
ROW_GROUP = 16_384  # rows that a search reads: 256 kB

Keys = npt.NDArray[np.uint64]
Images = npt.NDArray[np.int64]


def write_lookups(store: Store, parts: list[Part], executor: Executor, events: Events) -> None:
    """`lineage/parts` -> `lineage/by_id`, `by_component` and `by_query`."""
    items: list[Item] = []
    for group in _groups(parts):
        images = sum(part.rows for part in group)
        items.append(Item(f"lookups of {group[0].name()}", images, (len(items), group)))
    have = {entry.path for entry in store.list(lookup_folder(LOOKUPS[-1]))}
    worker = partial(LookupWorker, store.uri)
    work = Work("lineage", items, lambda i: _path(LOOKUPS[-1], i.payload[0]) in have, worker)
    require_all(map_parts(work, executor, events), "lineage")


def _groups(parts: list[Part]) -> list[list[Part]]:
    """Neighbouring parts of about GROUP_IMAGES together."""
    groups: list[list[Part]] = []
    images = GROUP_IMAGES
    for part in parts:
        if images + part.rows > GROUP_IMAGES:
            groups.append([])
            images = 0
        groups[-1].append(part)
        images += part.rows
    return groups


def _path(lookup: str, group: int) -> str:
    return f"{lookup_folder(lookup)}/{group:06d}.parquet"


class LookupWorker:
    """Writes the three tables of one group of parts."""

    def __init__(self, run_uri: str) -> None:
        self._store = open_store(run_uri)

    def __call__(self, item: tuple[int, list[Part]]) -> Counts:
        group, parts = item
        found: dict[str, list[tuple[Keys, Images]]] = {lookup: [] for lookup in LOOKUPS}
        for part in parts:
            columns = ["id", "component", "retrieved_by", "image"]
            table = read_table(self._store, lineage_path(part.part), columns)
            for lookup, pairs in _pairs(table).items():
                found[lookup].append(pairs)
        for lookup, blocks in found.items():  # in the order of LOOKUPS: the last one tells
            keys = np.concatenate([block[0] for block in blocks])
            images = np.concatenate([block[1] for block in blocks])
            order = np.lexsort((images, keys))
            columns = [pa.array(keys[order]), pa.array(images[order])]
            rows = pa.Table.from_arrays(columns, schema=LOOKUP)
            write_table(self._store, _path(lookup, group), rows, row_group_size=ROW_GROUP)
        return {"images": sum(part.rows for part in parts)}


def _pairs(table: pa.Table) -> dict[str, tuple[Keys, Images]]:
    """Keys and images of one part's lineage, by lookup."""
    image = table["image"].combine_chunks()
    has_id, grouped = table["id"].is_valid(), table["component"].is_valid()
    lists = table["retrieved_by"].combine_chunks()
    asked = lists.flatten().field("query_id")
    brought = image.take(pc.list_parent_indices(lists)).filter(asked.is_valid())
    components = table["component"].filter(grouped).to_numpy().astype(np.uint64)
    queries = np.stack([_prefixes(asked.drop_null()), brought.to_numpy().astype(np.uint64)])
    queries = np.unique(queries, axis=1)  # a query may bring an image in two ways
    return {
        "id": (_prefixes(table["id"].drop_null()), image.filter(has_id).to_numpy()),
        "component": (components, image.filter(grouped).to_numpy()),
        "query": (queries[0], queries[1].astype(np.int64)),
    }


def _prefixes(ids: pa.Array) -> Keys:
    """The first 8 bytes of hexadecimal ids (n,) as numbers."""
    digits = "".join(pc.utf8_slice_codeunits(ids, 0, 16).to_pylist())
    return np.frombuffer(bytes.fromhex(digits), ">u8").astype(np.uint64)
