"""Selected images -> a plan in the order of the shards: where the bytes of each image lie.

The order is a seeded shuffle by content, so that the images of a shard come from everywhere. Parts
are read once: chunks of them send their rows to the plans, and each plan gathers and sorts its own.

`shards/order.parquet`    the place of each selected image in the shuffle, by image
`shards/places/*.blocks`  the rows of a chunk of parts, a block a plan
`shards/plan/*.parquet`   the rows of PLAN_ROWS images in order, a row group a shard
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from curation.algorithms.sampling import Ints, priorities
from curation.runtime.events import Events
from curation.runtime.executor import Counts, Executor, Item, Work, map_parts, require_all
from curation.runtime.store import Store, open_store, read_table, write_table
from curation.schema import PLACEMENT, PLAN
from curation.stages.exchange import receive_each, send
from curation.stages.modes import id_words
from curation.stages.retrieve import ROW_GROUP_ROWS, SELECTED_TABLE
from curation.stages.tables import (
    Embedded,
    Part,
    column_bytes,
    column_numpy,
    read_parts,
    rows_of_part,
)

PLAN_ROWS = 500_000  # images planned together: about 0.5 GB
CHUNK_IMAGES = 1 << 20  # of the parts that one worker looks through
ORDER_TABLE = "shards/order.parquet"
PLACEMENT_TABLE = "shards/placement.parquet"
POSITION = pa.field("position", pa.int64())


@dataclass(frozen=True)
class PlanConfig:
    """Whose embeddings, images a shard, the seed of the shuffle, and parts that were spooled."""

    embedding: str
    images_per_shard: int
    seed: int
    spooled: frozenset[int]

    @property
    def shards_per_plan(self) -> int:
        return max(1, PLAN_ROWS // self.images_per_shard)

    @property
    def span(self) -> int:
        """Images of a plan."""
        return self.shards_per_plan * self.images_per_shard


def shard_name(shard: int) -> str:
    return f"{shard:06d}.tar"


def spool_path(part: Part) -> str:
    return f"shards/spool/{part.part:06d}.parquet"


def plan_path(plan: int) -> str:
    return f"shards/plan/{plan:06d}.parquet"


def _places_path(chunk: int) -> str:
    return f"shards/places/{chunk:06d}.blocks"


def plan(cfg: PlanConfig, store: Store, executor: Executor, events: Events) -> None:
    """Writes `shards/plan/*.parquet`, then where each image will be."""
    selected = read_table(store, SELECTED_TABLE, ["image", "id"])
    numbers = column_numpy(selected, "image")
    words = id_words(column_bytes(selected, "id"))
    position = np.empty(len(numbers), np.int64)
    position[np.lexsort((words, priorities(words, cfg.seed)))] = np.arange(len(numbers))
    order = pa.table({"image": pa.array(numbers), "position": pa.array(position)})
    write_table(store, ORDER_TABLE, order, row_group_size=ROW_GROUP_ROWS)
    plans, chunks = -(-len(numbers) // cfg.span), _chunks(read_parts(store), numbers)
    items = [(_places_path(at), chunk) for at, chunk in enumerate(chunks)]
    _work(items, partial(PlaceWorker, cfg, store.uri, plans), store, executor, events)
    plan_items = [(plan_path(number), number) for number in range(plans)]
    _work(plan_items, partial(PlanWorker, cfg, store.uri, len(chunks)), store, executor, events)
    shard = position // cfg.images_per_shard
    names = np.array([shard_name(number) for number in range(int(shard.max()) + 1)])
    columns = [pa.array(numbers), pa.array(names[shard])]
    write_table(store, PLACEMENT_TABLE, pa.Table.from_arrays(columns, schema=PLACEMENT))


def _chunks(parts: Sequence[Part], numbers: Ints) -> list[list[Part]]:
    """Consecutive parts with selected images, of about CHUNK_IMAGES images together."""
    chunks: list[list[Part]] = []
    filled = CHUNK_IMAGES
    for part in parts:
        first, last = np.searchsorted(numbers, [part.base, part.base + part.rows])
        if first == last:
            continue
        if filled + part.rows > CHUNK_IMAGES:
            chunks.append([])
            filled = 0
        chunks[-1].append(part)
        filled += part.rows
    return chunks


def _work(
    items: Sequence[tuple[str, object]],
    make: "partial[PlaceWorker] | partial[PlanWorker]",
    store: Store,
    executor: Executor,
    events: Events,
) -> None:
    have = {entry.path for entry in store.list("shards")}
    named = [Item(path, 0, (path, payload)) for path, payload in items]
    work = Work("shards", named, lambda item: item.name in have, make)
    require_all(map_parts(work, executor, events), "shards")


class PlaceWorker:
    """Sends the rows of the selected images of some parts to the plans that they belong to."""

    def __init__(self, cfg: PlanConfig, run_uri: str, plans: int) -> None:
        self._cfg, self._store, self._plans = cfg, open_store(run_uri), plans
        self._embedded = Embedded(cfg.embedding)

    def __call__(self, item: tuple[str, list[Part]]) -> Counts:
        path, parts = item
        blocks = [self._rows(part) for part in parts]
        rows = pa.concat_tables(blocks)
        to = column_numpy(rows, "position") // self._cfg.span
        send(self._store, path, rows, to, self._plans)
        return {"images": len(rows)}

    def _rows(self, part: Part) -> pa.Table:
        """PLAN rows of the selected images of one part, with their positions."""
        store, order = self._store, rows_of_part(self._store, ORDER_TABLE, part)
        numbers = column_numpy(order, "image")
        rows = pa.array(numbers - part.base)
        members = read_table(store, part.table, row_group=part.row_group).take(rows)
        images = read_table(store, self._embedded.images_path(part)).take(rows)
        chosen = rows_of_part(store, SELECTED_TABLE, part)
        count = len(numbers)
        none = pa.chunked_array([pa.nulls(count, pa.uint64())])  # embedded before there were any
        columns = {
            "image": pa.array(numbers),
            "role": pa.array([part.role] * count),
            "set": pa.array([part.set or None] * count, pa.string()),
            "source": pa.array([part.source or store.uri] * count),
            "metadata": pa.nulls(count, pa.string()),
            **{name: members[name] for name in ("key", "locator", "offset", "size", "extras")},
            **{name: images[name] for name in ("id", "ext", "width", "height")},
            "checksum": images["checksum"] if "checksum" in images.column_names else none,
            "retrieved_by": chosen["retrieved_by"],
            "position": order["position"],
        }
        if part.part in self._cfg.spooled:
            index = read_table(store, spool_path(part))
            index = index.take(pa.array(np.searchsorted(index["image"].to_numpy(), numbers)))
            columns |= {name: index[name] for name in ("offset", "size", "metadata")}
            path = spool_path(part).replace(".parquet", ".bin").encode()
            columns["source"] = pa.array([store.uri] * count)
            columns["locator"] = pa.array([path] * count)
        schema = PLAN.append(POSITION)
        return pa.table([columns[name] for name in schema.names], schema=schema)


class PlanWorker:
    """Gathers and sorts the rows of one plan."""

    def __init__(self, cfg: PlanConfig, run_uri: str, chunks: int) -> None:
        self._cfg, self._store, self._chunks = cfg, open_store(run_uri), chunks

    def __call__(self, item: tuple[str, int]) -> Counts:
        path, number = item
        sent = [_places_path(at) for at in range(self._chunks)]
        rows = pa.concat_tables(receive_each(self._store, sent, number))
        rows = rows.sort_by("position").drop_columns("position")
        write_table(self._store, path, rows, row_group_size=self._cfg.images_per_shard)
        return {"images": len(rows)}
