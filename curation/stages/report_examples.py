"""The report's pictures: which images are shown, what is known of them, and their thumbnails.

Everything is drawn by the recipe's seed, and bounded by the constants below for runs of any size.
"""

import base64
import hashlib
import io
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from curation.algorithms.sampling import Ints, draw_by_cluster, priorities
from curation.images.decode import Limits, decode
from curation.images.faces import FaceBlur
from curation.images.sources import read_parquet_rows
from curation.runtime.store import Store, StoreError, read_table
from curation.stages.cluster import assignments_path
from curation.stages.report_facts import selected_batches
from curation.stages.tables import (
    Embedded,
    Part,
    by_part,
    column_numpy,
    decisions_path,
    ids_of,
    overlapped,
    read_decisions,
)

QUERIES, NEIGHBOURS = 8, 4
GROUPS, MEMBERS = 8, 6
CLUSTERS, CLUSTER_IMAGES = 6, 6
GROUP_SAMPLE = 512  # groups drawn; those shown are the largest of them and the first drawn
SIDE = 176  # pixels: the longer side of a thumbnail
THUMBNAIL_BYTES = 9_000  # all thumbnails together stay below 1.5 MB as base64
QUALITIES = (82, 60, 35, 15)

Item = dict[str, Any]


@dataclass(frozen=True)
class Showing:
    """How pictures are shown: what is accepted, and with faces blurred where the recipe asks it."""

    limits: Limits
    blur: FaceBlur | None


def gallery(
    store: Store, embedded: Embedded, parts: list[Part], sets: list[str], seed: int
) -> list[Item]:
    """Some queries of the sets that are used by `sample`, with their nearest selected images."""
    rng = np.random.default_rng([seed, 2])
    drawn = []
    for name in (sets[at] for at in sorted(rng.permutation(len(sets))[:QUERIES])):
        mine = [part for part in parts if part.role == "curated" and part.set == name]
        drawn.append([(name, number) for number in _kept(store, mine, rng)])
    turns = [pick for turn in zip_longest(*drawn) for pick in turn if pick is not None]
    picked = sorted(turns[:QUERIES], key=lambda pick: sets.index(pick[0]))
    numbers = np.array([number for _, number in picked], np.int64)
    ids = [row.tobytes().hex() for row in ids_of(store, embedded, parts, numbers)]
    nearest = _neighbours(store, sorted(set(ids)))
    return [
        {"set": name, "image": number, "neighbours": nearest.get((name, key), [])}
        for (name, number), key in zip(picked, ids, strict=True)
    ]


def _kept(store: Store, parts: list[Part], rng: np.random.Generator) -> list[int]:
    """Up to QUERIES images of a set that were not thrown out, in random order."""
    ends = np.cumsum([part.rows for part in parts])
    flat = rng.choice(ends[-1], min(int(ends[-1]), 8 * QUERIES), replace=False)
    at = np.searchsorted(ends, flat, side="right")
    first = np.array([part.base + part.rows for part in parts]) - ends
    numbers = np.sort(first[at] + flat)
    kept: list[int] = []
    for part, block in by_part(parts, numbers):
        decision = read_decisions(store, part)["decision"].take(numbers[block] - part.base)
        kept += numbers[block][pc.equal(decision, "kept").to_numpy()].tolist()
    return [int(number) for number in rng.permutation(kept)[:QUERIES]]


def _neighbours(store: Store, ids: list[str]) -> dict[tuple[str, str], list[Item]]:
    """By set and query id: the nearest images that were selected for it."""
    found: dict[tuple[str, str], list[Item]] = {}
    wanted = pa.array(ids, pa.string())
    for batch in selected_batches(store):
        lists = batch["retrieved_by"].combine_chunks()
        owner = batch["image"].take(pc.list_parent_indices(lists))
        reasons = lists.flatten()
        mine = pc.is_in(reasons.field("query_id"), wanted)
        rows = zip(owner.filter(mine).to_pylist(), reasons.filter(mine).to_pylist(), strict=True)
        for image, reason in rows:
            near = found.setdefault((reason["set"], reason["query_id"]), [])
            near.append({"image": image, "cosine": round(reason["cosine"], 4)})
            near.sort(key=lambda one: (-one["cosine"], one["image"]))
            del near[NEIGHBOURS:]
    return found


def duplicate_groups(store: Store, parts: list[Part], seed: int) -> list[Item]:
    """Groups of near-duplicates: half the largest of a sample, half as they were drawn."""
    sample = np.empty(0, np.int64)
    pool = [part for part in parts if part.role == "pool"]
    for _, table in overlapped(
        pool, lambda part: read_table(store, decisions_path(part), ["component"])
    ):
        labels = table["component"].drop_null()
        sample = np.unique(np.r_[sample, pc.unique(labels).to_numpy()])
        sample = np.sort(_drawn(sample, seed)[:GROUP_SAMPLE])
    sizes, members = _members(store, parts, sample)
    largest = sample[np.argsort(-sizes, kind="stable")]
    order = [*largest[: GROUPS // 2], *_drawn(sample, seed), *largest]
    shown = sorted(list(dict.fromkeys(order))[:GROUPS], key=lambda one: list(largest).index(one))
    groups = []
    for label in shown:
        mine = [row for row in members.to_pylist() if row["component"] == label]
        mine.sort(key=lambda row: (row["decision"] != "kept", row["image"]))
        images = [{**row, "cosine": round(row["cosine"], 4)} for row in mine]
        for row in images:
            del row["component"]
        size = int(sizes[np.searchsorted(sample, label)])
        groups.append({"group": int(label), "size": size, "images": images})
    return groups


def _drawn(labels: Ints, seed: int) -> Ints:
    """Labels (n,) in the random order of the seed."""
    order: Ints = labels[np.argsort(priorities(labels.astype(np.uint64), seed), kind="stable")]
    return order


def _members(store: Store, parts: list[Part], sample: Ints) -> tuple[Ints, pa.Table]:
    """Sizes (n,) of the groups `sample`, and up to MEMBERS rows of each, the kept image first."""
    sizes = np.zeros(len(sample), np.int64)
    tables = []
    wanted = ["component", "decision", "cosine"]
    for part, table in overlapped(
        parts, lambda part: read_table(store, decisions_path(part), wanted)
    ):
        table = table.append_column("image", pa.array(np.arange(part.base, part.base + part.rows)))
        table = table.filter(pc.is_in(table["component"], pa.array(sample)))
        label, image = column_numpy(table, "component"), column_numpy(table, "image")
        sizes += np.bincount(np.searchsorted(sample, label), minlength=len(sample))
        later = pc.not_equal(table["decision"], "kept").to_numpy()
        rank = image.astype(np.uint64) + later.astype(np.uint64) * np.uint64(1 << 62)
        table = table.append_column("rank", pa.array(rank))
        tables.append(table.take(pa.array(draw_by_cluster(label, rank, MEMBERS, len(label)))))
    found = pa.concat_tables(tables)
    label, rank = column_numpy(found, "component"), found["rank"].to_numpy()
    keep = draw_by_cluster(label, rank, MEMBERS, len(label))
    return sizes, found.take(pa.array(keep)).drop_columns("rank")


def cluster_examples(store: Store, parts: list[Part], sizes: Ints, seed: int) -> list[Item]:
    """Random images of some clusters, the largest cluster first."""
    rng = np.random.default_rng([seed, 3])
    many = np.flatnonzero(sizes >= min(CLUSTER_IMAGES, sizes.max()))
    shown = np.sort(rng.permutation(many)[:CLUSTERS])
    cluster, image = np.empty(0, np.int64), np.empty(0, np.int64)
    pool, wanted = [part for part in parts if part.role == "pool"], ["image", "cluster"]
    for _, table in overlapped(
        pool, lambda part: read_table(store, assignments_path(part), wanted)
    ):
        table = table.filter(pc.is_in(table["cluster"], pa.array(shown.astype(np.int32))))
        cluster = np.r_[cluster, column_numpy(table, "cluster")]
        image = np.r_[image, column_numpy(table, "image")]
        rank = priorities(image.astype(np.uint64), seed)
        keep = draw_by_cluster(cluster, rank, CLUSTER_IMAGES, len(image))
        cluster, image = cluster[keep], image[keep]
    order = sorted(shown.tolist(), key=lambda one: (-sizes[one], one))
    return [
        {
            "cluster": one,
            "size": int(sizes[one]),
            "images": [{"image": int(number)} for number in np.sort(image[cluster == one])],
        }
        for one in order
    ]


def describe(
    store: Store, embedded: Embedded, parts: list[Part], items: list[Item], show: Showing
) -> dict[int, str]:
    """Adds id, key and size to items that name an image by number; returns their thumbnails.

    An image whose source is gone or has changed gets `unavailable` with the reason instead.
    """
    numbers = np.unique([item["image"] for item in items]).astype(np.int64)
    known: dict[int, Item] = {}
    thumbnails: dict[int, str] = {}
    for part, block in by_part(parts, numbers):
        rows = pa.array(numbers[block] - part.base)
        images = read_table(store, embedded.images_path(part)).take(rows).to_pylist()
        members = read_table(store, part.table, row_group=part.row_group).take(rows).to_pylist()
        for number, image, member in zip(numbers[block].tolist(), images, members, strict=True):
            facts = {name: image[name] for name in ("key", "width", "height")}
            known[number] = {"id": image["id"].hex(), "source": part.role, **facts}
            try:
                data = read_original(store, part, member, show.limits.max_bytes)
                if hashlib.sha256(data).digest() != image["id"]:
                    raise StoreError("it has changed since it was embedded")
                thumbnails[number] = thumbnail(data, show)
            except Exception as error:  # one image's source; whatever it is, the report goes on
                known[number]["unavailable"] = str(error).rpartition(": ")[2][:120]
    for item in items:
        item |= known[item["image"]]
    return thumbnails


def read_original(store: Store, part: Part, member: Item, max_bytes: int) -> bytes:
    """An image's bytes from its source. Errors: StoreError, or the format's own when it changed."""
    path = member["locator"].decode("utf-8", "surrogateescape")
    source = part.open_source(store)
    if part.kind == "folder":
        return source.read(path, 0, max_bytes)
    with source.open(path) as file:
        if part.kind == "parquet":
            data, _ = next(read_parquet_rows(file, member["offset"], 1), (None, {}))
            return data or b""
        file.seek(member["offset"])
        return file.read(member["size"])


def thumbnail(data: bytes, show: Showing) -> str:
    """A small JPEG of an image as a data URI. Raises BadImage."""
    image = decode(data, show.limits).pixels
    if show.blur is not None:
        image, _ = show.blur.image(image)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    for quality in QUALITIES:
        small = io.BytesIO()
        # Pillow would carry a JPEG's comment over, whatever its size.
        image.save(small, "JPEG", quality=quality, optimize=True, comment=b"")
        if small.tell() <= THUMBNAIL_BYTES:
            break
    return "data:image/jpeg;base64," + base64.b64encode(small.getvalue()).decode()
