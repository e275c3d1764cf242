"""The report's numbers: every table is read once, part by part, and only counts stay in memory."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.images.encoders import DEMO_MODEL
from curation.runtime.status import stage_images
from curation.runtime.store import Store, read_table
from curation.stages.cluster import assignments_path
from curation.stages.retrieve import SELECTED_TABLE
from curation.stages.tables import Embedded, Part, overlapped

EDGES = np.linspace(-1, 1, 101)  # cosines in steps of 0.02
NONE = np.zeros(len(EDGES) - 1, np.int64)
FEWEST_BINS = 10
CURVE_POINTS = 200
EXAMPLE_KEYS = 4

Counts = npt.NDArray[np.int64]

# What a stage counts its images by, for the rate.
WORK = {
    "ingest": "found",
    "embed": "decoded and embedded",
    "dedup": "compared",
    "cluster": "clustered",
    "retrieve": "selected",
    "shards": "written",
    "lineage": "accounted for",
}


def composition(
    store: Store, parts: list[Part], stages: dict[str, Any], recipe: Any
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A row a set and mode, as in DINOv2's table 15, and the cosines of what was retrieved.

    `retrieved` counts every choice, `distinct` every image once, `final` every image of the union
    in the first row that brought it: the column adds up to what was written.
    """
    chosen, final, cosines = _choices(store)
    sizes: Counter[str] = Counter()
    for part in parts:
        if part.role == "curated":
            sizes[part.set] += part.rows
    rows = []
    for mode in stages["retrieve"]["modes"]:
        one, how = mode["set"], mode["how"]
        name = f"{one}:{how}"
        row = {"set": one, "images": sizes[one], "how": how}
        row |= {"retrieval": _retrieval(recipe["sources"]["curated"][one], how)}
        row |= {"retrieved": chosen[name], "distinct": mode["images"], "final": final[name]}
        known = how == "sample" and chosen[name] > 0
        rows.append(row | {"median_cosine": median(cosines[name]) if known else None})
    total = {name: sum(row[name] for row in rows) for name in ("retrieved", "final")}
    total["images"] = sum(sizes.values())
    sampled = sum((counts for name, counts in cosines.items() if name.endswith(":sample")), NONE)
    return {"rows": rows, "total": total}, histogram(sampled)


def selected_batches(store: Store) -> Iterator[pa.Table]:
    """`retrieve/selected.parquet`, a row group at a time."""
    with store.open(SELECTED_TABLE) as file:
        table = pq.ParquetFile(file)
        for group in range(table.num_row_groups):
            yield table.read_row_group(group)


def _choices(store: Store) -> tuple[Counter[str], Counter[str], dict[str, Counts]]:
    """By `set:mode`: the reasons, the images whose first reason it is, and the reasons' cosines."""
    chosen: Counter[str] = Counter()
    final: Counter[str] = Counter()
    cosines: dict[str, Counts] = {}
    for batch in selected_batches(store):
        lists = batch["retrieved_by"].combine_chunks()
        reasons = lists.flatten()
        how = pc.replace_substring_regex(reasons.field("how"), ":.*", "")
        names = pc.binary_join_element_wise(reasons.field("set"), how, ":")
        _add(chosen, names)
        starts = lists.offsets.to_numpy()[:-1] - lists.offsets[0].as_py()
        _add(final, names.take(pa.array(starts)))
        for name in pc.unique(names).to_pylist():
            mine = reasons.field("cosine").filter(pc.equal(names, name)).drop_null()
            cosines[name] = cosines.get(name, NONE) + binned(mine.to_numpy())
    return chosen, final, cosines


def _add(counter: Counter[str], names: pa.Array) -> None:
    for row in names.value_counts().to_pylist():
        counter[row["values"]] += row["counts"]


def _retrieval(curated: Any, how: str) -> str:
    """A mode of a set as the table names it: `as is`, `sample 4`, `cluster, 10,000 each`."""
    given: dict[str, Any] = next((mode[how] for mode in curated["retrieve"] if mode.get(how)), {})
    if how == "sample":
        return f"sample {given['k']}"
    if how == "hierarchical":
        return f"hierarchical, {given['target_size']:,}"
    return "as is" if how == "as_is" else f"{how}, {given['per_cluster']:,} each"


def balance(stages: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a set and level of its `hierarchical` draw: how evenly images lie over its clusters."""
    return [
        {"set": mode["set"], **level}
        for mode in stages["retrieve"]["modes"]
        for level in mode.get("levels", [])
    ]


def binned(cosines: npt.NDArray[np.float32]) -> Counts:
    """How many cosines lie in each bin of EDGES; fp16 rows can give a little more than 1."""
    return np.histogram(np.clip(cosines, -1, 1), EDGES)[0]


def median(counts: Counts) -> float:
    """The middle of the bin that holds the median."""
    bin_number = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
    return round(float(EDGES[bin_number : bin_number + 2].mean()), 2)


def histogram(counts: Counts) -> dict[str, Any] | None:
    """Counts (bins,) cut to those from the first to the last that holds any; None when empty."""
    used = np.flatnonzero(counts)
    if not len(used):
        return None
    low = min(int(used[0]), len(counts) - FEWEST_BINS)
    high = max(int(used[-1]) + 1, low + FEWEST_BINS)
    return {
        "low": round(float(EDGES[low]), 2),
        "width": 0.02,
        "counts": counts[low:high].tolist(),
        "total": int(counts.sum()),
        "median": median(counts),
    }


def duplicate_links(store: Store) -> dict[str, Any] | None:
    """The cosines of all links that dedup found; most pairs are seen from both sides."""
    counts = NONE
    for entry in store.list("dedup/self/answers"):
        counts = counts + binned(read_table(store, entry.path, ["cosine"])["cosine"].to_numpy())
    return histogram(counts)


def group_sizes(dedup: dict[str, Any]) -> dict[str, Any]:
    """Groups by size in steps that double (2, 3-4, 5-8, …), and the groups that had to be cut."""
    exact = {int(size): groups for size, groups in dedup["component_sizes"].items()}
    steps: Counter[int] = Counter()
    for size, groups in exact.items():
        steps[(size - 1).bit_length()] += groups
    return {
        "total": sum(exact.values()),
        "largest": max(exact, default=0),
        "sizes": [
            {"low": 2 ** (step - 1) + 1, "high": 2**step, "groups": steps[step]}
            for step in range(1, max(steps, default=0) + 1)
        ],
        "giants": sorted(dedup["giants"], key=lambda giant: -int(giant["size"])),
    }


def near_hashes(recipe: Any, stages: dict[str, Any]) -> dict[str, Any] | None:
    """How the perceptual hash was used, and how many pool images it found; None if it wasn't."""
    given: dict[str, Any] | None = recipe["safety"]["phash"]
    return given and {**given, "images": stages["embed"]["phash_duplicates"]}


def cluster_sizes(store: Store, parts: list[Part], clusters: int) -> Counts:
    """Images in each cluster (k,)."""
    sizes = np.zeros(clusters, np.int64)
    pool = [part for part in parts if part.role == "pool"]
    for _, table in overlapped(
        pool, lambda part: read_table(store, assignments_path(part), ["cluster"])
    ):
        sizes += np.bincount(table["cluster"].to_numpy(), minlength=clusters)
    return sizes


def describe_clusters(sizes: Counts) -> dict[str, Any]:
    """Sizes in figures, and as a curve from the largest to the smallest of at most 200 points."""
    falling = np.sort(sizes)[::-1]
    ranks = np.linspace(0, len(sizes) - 1, min(len(sizes), CURVE_POINTS)).round().astype(int)
    return {
        "clusters": len(sizes),
        "empty": int((sizes == 0).sum()),
        "smallest": int(falling[-1]),
        "median": float(np.median(sizes)),
        "mean": round(float(sizes.mean()), 1),
        "largest": int(falling[0]),
        "curve": [[int(rank) + 1, int(falling[rank])] for rank in ranks],
    }


def rejections(store: Store, embedded: Embedded, parts: list[Part]) -> list[dict[str, Any]]:
    """Every reason of rejection, most frequent first, with its count and the first few images."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[dict[str, str]]] = {}
    for _, table in overlapped(
        parts, lambda part: read_table(store, embedded.images_path(part), ["key", "fault"])
    ):
        table = table.filter(pc.is_valid(table["fault"]))
        reasons = pc.replace_substring_regex(table["fault"], "(?s) .*", "")
        _add(counts, reasons)
        for reason in pc.unique(reasons).to_pylist():
            few = examples.setdefault(reason, [])
            found = table.filter(pc.equal(reasons, reason)).slice(0, EXAMPLE_KEYS - len(few))
            few += [{"key": row["key"], "fault": row["fault"]} for row in found.to_pylist()]
    return [
        {"reason": reason, "images": count, "examples": examples[reason]}
        for reason, count in counts.most_common()
    ]


def searches(stages: dict[str, Any]) -> list[dict[str, Any]]:
    """How each search was done and the recall that was measured on a sample of it."""
    named = [
        ("near-duplicates in the pool", stages["dedup"]["search"]),
        ("images near the evaluation sets", stages["dedup"].get("holdout_search")),
        *((f"neighbours of {m['set']}", m) for m in stages["retrieve"]["modes"] if "recall" in m),
    ]
    facts = ("method", "recall", "cells", "nprobe", "buckets", "waves")
    return [
        {"search": name, **{fact: found[fact] for fact in facts if fact in found}}
        for name, found in named
        if found
    ]


def timings(stages: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds and images a second by stage; no rate where an earlier session did a part of it."""
    rows = []
    for name, work in WORK.items():
        seconds = stages[name]["seconds"]
        whole = seconds and not stages[name].get("reused")
        images = stage_images(name, stages[name], stages["ingest"]["images"])
        rate = round(images / seconds, 1) if whole else None
        row = {"stage": name, "seconds": seconds, "images": images, "work": work}
        rows.append({**row, "images_per_s": rate})
    return rows


def models(recipe: Any, stages: dict[str, Any]) -> dict[str, Any]:
    """The models and thresholds that were used, and plain warnings about stand-ins."""
    encoder, copy = recipe["encoder"], recipe["copy_descriptor"]["weights"]
    return {
        "encoder": {**encoder, "demo": encoder["model"] == DEMO_MODEL},
        "copy_descriptor": {"weights": copy, "fallback": copy == "builtin"},
        "embedding": stages["embed"]["embedding"],
        "thresholds": {
            "dedup.min_cosine": stages["dedup"]["min_cosine"],
            "dedup.holdout_min_cosine": stages["dedup"]["holdout_min_cosine"],
            "dedup.k": recipe["dedup"]["k"],
            "dedup.max_component": recipe["dedup"]["max_component"],
            "search.target_recall": recipe["search"]["target_recall"],
            "search.exact_below": recipe["search"]["exact_below"],
        },
    }


def notices(found: dict[str, Any], stages: dict[str, Any]) -> list[str]:
    """What a reader must know before trusting the numbers, in plain sentences."""
    said = []
    if found["copy_descriptor"]["fallback"]:
        said.append(
            "The copy descriptor is the small one that comes with LVD, not SSCD: it misses more"
            " copies and joins more unlike images. Set copy_descriptor.weights to SSCD's file for"
            " a real dataset."
        )
    if found["encoder"]["demo"]:
        said.append(
            "The encoder is the demo encoder that comes with LVD: good for trying things out, not"
            " for a dataset to train on."
        )
    if failed := stages["embed"].get("failed_parts"):
        said.append(f"{len(failed)} parts could not be embedded; `curate retry` tries them again.")
    return said
