"""The mode `hierarchical`: draws from the whole kept pool, balanced over its concepts.

Vo et al., arXiv 2405.15613. The levels stand on the clusters of the `cluster` stage and are fitted
in this process, which holds the centroids of all levels.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from curation.algorithms import hierarchy
from curation.runtime.store import read_table, write_table
from curation.schema import HIERARCHY
from curation.stages.cluster import sizes_of
from curation.stages.cluster_tables import read_centroids
from curation.stages.draws import Quota
from curation.stages.modes import HierarchicalConfig, Task
from curation.stages.tables import column_numpy


def quota(task: Task, one: HierarchicalConfig) -> Quota:
    """`target_size` images of the pool; the set's own images have no part in it."""
    path = f"retrieve/hierarchy/{task.set}.parquet"
    if not task.store.exists(path):
        write_table(task.store, path, _fit(task, one))
    table = read_table(task.store, path)
    level, per_cluster = column_numpy(table, "level"), column_numpy(table, "quota")
    facts = {"asked": one.target_size, "levels": _balance(table)}
    return Quota(task, "hierarchical", per_cluster[level == 1], one.target_size, facts)


def _fit(task: Task, one: HierarchicalConfig) -> pa.Table:
    """The HIERARCHY table."""
    centroids = read_centroids(task.store)
    rng = np.random.default_rng([task.cfg.seed, 1])
    levels = hierarchy.grow(centroids, one.counts, rng)
    images = hierarchy.sizes_of_levels(sizes_of(task.store, len(centroids)), levels)
    quotas = hierarchy.top_down(one.target_size, images, levels)
    parents = [pa.array(level.parent, pa.int32()) for level in levels]
    parents.append(pa.nulls(len(images[-1]), pa.int32()))
    tables = []
    for number, (parent, size, quota) in enumerate(zip(parents, images, quotas, strict=True), 1):
        level = pa.array(np.full(len(size), number, np.int32))
        cluster = pa.array(np.arange(len(size), dtype=np.int32))
        columns = [level, cluster, parent, pa.array(size), pa.array(quota)]
        tables.append(pa.Table.from_arrays(columns, schema=HIERARCHY))
    return pa.concat_tables(tables).combine_chunks()


def _balance(table: pa.Table) -> list[dict[str, Any]]:
    """By level: clusters that hold images, and how evenly the pool and the draw lie over them."""
    level = column_numpy(table, "level")
    images, quota = column_numpy(table, "images"), column_numpy(table, "quota")
    found = []
    for number in range(1, level.max() + 1):
        held = (level == number) & (images > 0)
        found.append(
            {
                "level": number,
                "clusters": int(held.sum()),
                "drawn_from": int((quota[held] > 0).sum()),
                "pool_evenness": round(hierarchy.evenness(images[held]), 4),
                "drawn_evenness": round(hierarchy.evenness(quota[held]), 4),
            }
        )
    return found
