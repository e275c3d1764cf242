"""Kept pool x curated sets -> the selected images, each with every reason for which it is in.

What each set chooses, by the modes its recipe names, is in `modes.py`; here the choices of all are
united. The union runs in this process: about 60 bytes a choice (8.5 GB for 142 million).
"""

from typing import Any

import numpy as np
import pyarrow as pa

from curation.runtime.events import Events
from curation.runtime.executor import Executor, timer
from curation.runtime.manifest import StageReport, begin, finish
from curation.runtime.store import Store, StoreError, write_table
from curation.schema import RETRIEVED_BY, SAME_BYTES, SELECTED
from curation.stages import draws, hierarchical, modes
from curation.stages.modes import Choices, RetrieveConfig, Task
from curation.stages.neighbour_index import Crew
from curation.stages.tables import Embedded, first_of_equal, ids_of, read_parts

SELECTED_TABLE = "retrieve/selected.parquet"
SAME_BYTES_TABLE = "retrieve/same_bytes.parquet"
ROW_GROUP_ROWS = 65_536
HOWS = ("as_is", "sample", "cluster", "hierarchical")  # modes in the order of their reasons


def run(
    cfg: RetrieveConfig, stage_fingerprint: str, store: Store, executor: Executor, events: Events
) -> StageReport:
    """Vectors, decisions, clusters -> `retrieve/selected.parquet`, one row a selected image."""
    elapsed = timer()
    begin(store, "retrieve", stage_fingerprint)
    chosen = _choose(cfg, Crew(store, executor, events))
    counts = _write_selected(chosen, Embedded(cfg.embedding), store)
    counts["modes"] = [
        {"set": c.set, "how": c.how, "images": len(np.unique(c.image)), **c.facts} for c in chosen
    ]
    draws.clear(store)
    return finish(store, StageReport("retrieve", stage_fingerprint, counts, elapsed()))


def _choose(cfg: RetrieveConfig, crew: Crew) -> list[Choices]:
    """What each mode of each set chooses, in order; sets that use the same mode do so together."""
    sets = [(Task(cfg, one.name, crew.store), one) for one in cfg.sets]
    found = [modes.as_is(task) for task, one in sets if one.as_is]
    sampled = [(task, one.sample) for task, one in sets if one.sample]
    found += modes.sample(sampled, crew).values()
    clustered = [(task, one.cluster) for task, one in sets if one.cluster]
    quotas = draws.by_cluster(clustered, crew)
    quotas += [hierarchical.quota(t, one.hierarchical) for t, one in sets if one.hierarchical]
    found += draws.draw(quotas, crew)
    by_mode = {(choices.set, choices.how): choices for choices in found}
    order = [(one.name, how) for one in cfg.sets for how in HOWS]
    return [by_mode[key] for key in order if key in by_mode]


def _write_selected(chosen: list[Choices], embedded: Embedded, store: Store) -> dict[str, Any]:
    """The union by content: the same bytes once, under the smallest number (curated sets first)."""
    image = np.concatenate([c.image for c in chosen])
    if not len(image):
        searched = any(c.facts.get("queries") for c in chosen)
        why = (
            "no cluster holds min_queries images of a set"
            if searched
            else "no curated image is left"
        )
        raise StoreError(f"retrieve: nothing was selected; {why}")
    numbers = np.unique(image)
    ids = ids_of(store, embedded, read_parts(store), numbers)
    keeper = first_of_equal(numbers, ids)
    copies = keeper != numbers
    same = pa.Table.from_arrays(
        [pa.array(numbers[copies]), pa.array(keeper[copies])], schema=SAME_BYTES
    )
    write_table(store, SAME_BYTES_TABLE, same)
    owner = keeper[np.searchsorted(numbers, image)]
    order = np.argsort(owner, kind="stable")
    reasons = _reasons(chosen, embedded, store).take(pa.array(order))
    selected, starts = np.unique(owner[order], return_index=True)
    offsets = pa.array(np.r_[starts, len(order)].astype(np.int32))
    selected_ids = ids[np.searchsorted(numbers, selected)]
    columns = [
        pa.array(selected),
        pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(32), len(selected), [None, pa.py_buffer(selected_ids.tobytes())]
        ),
        pa.ListArray.from_arrays(offsets, reasons),
    ]
    table = pa.Table.from_arrays(columns, schema=SELECTED)
    write_table(store, SELECTED_TABLE, table, row_group_size=ROW_GROUP_ROWS)
    return {"selected": len(selected), "choices": len(image), "same_bytes": int(copies.sum())}


def _reasons(chosen: list[Choices], embedded: Embedded, store: Store) -> pa.StructArray:
    """The RETRIEVED_BY struct of every choice, in order."""
    numbers = np.unique(np.concatenate([c.query for c in chosen]))
    numbers = numbers[numbers >= 0]
    ids = ids_of(store, embedded, read_parts(store, "curated"), numbers)
    query_ids = pa.array([row.tobytes().hex() for row in ids], pa.string())
    blocks = []
    for c in chosen:
        count = len(c.image)
        asked = np.searchsorted(numbers, c.query)
        ways = pa.array([c.how]).take(pa.array(np.zeros(count, np.int64)))
        if c.cluster is not None:
            names = pa.array([f"cluster:{n}" for n in range(c.cluster.max(initial=-1) + 1)])
            ways = names.cast(pa.string()).take(pa.array(c.cluster))
        fields = [
            pa.array([c.set]).take(pa.array(np.zeros(count, np.int64))),
            query_ids.take(pa.array(asked, mask=c.query < 0)),
            ways,
            pa.array(c.cosine, pa.float32(), mask=np.isnan(c.cosine)),
        ]
        blocks.append(pa.StructArray.from_arrays(fields, fields=list(RETRIEVED_BY)))
    return pa.concat_arrays(blocks)
