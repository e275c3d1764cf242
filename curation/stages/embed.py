"""Parts -> images and vectors: reads each image once, checks it, and embeds it with both models.

Outputs are content-addressed by the part and the models, so that a changed recipe embeds only what
it touches. Images with the same bytes are found here, over the whole pool, and on request those
with near perceptual hashes.
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import pyarrow as pa

from curation.runtime.events import Events
from curation.runtime.executor import Executor, Item, MapResult, Work, map_parts, timer
from curation.runtime.manifest import StageReport, begin, finish
from curation.runtime.store import Store, StoreError, delete_all, read_table, write_table
from curation.schema import IMAGES, vectors
from curation.stages.embed_worker import EmbedConfig, EmbedWorker
from curation.stages.exact import exact_duplicates
from curation.stages.perceptual import perceptual_duplicates
from curation.stages.tables import Embedded, Part, overlapped, read_parts

# Faults that may go away by themselves: `curate retry` tries these images again.
RETRYABLE = ("part_failed", "unreadable")


def run(
    cfg: EmbedConfig, stage_fingerprint: str, store: Store, executor: Executor, events: Events
) -> StageReport:
    """Parts -> `embed/images`, `embed/vectors` (one file a part) and `embed/exact.parquet`."""
    elapsed = timer()
    begin(store, "embed", stage_fingerprint, keep=("images", "vectors"))
    parts, embedded = read_parts(store), Embedded(cfg.embedding)
    have = {entry.path for entry in store.list("embed/vectors")}
    items = [Item(part.name(), part.rows, part) for part in parts]
    missing = [part for part in parts if embedded.vectors_path(part) not in have]
    dims = _dims(cfg) if missing else None
    result = map_parts(
        Work(
            "embed",
            items,
            lambda item: embedded.vectors_path(item.payload) in have,
            partial(EmbedWorker, cfg, store.uri),
            gpu=True,
            check=lambda progress: _check_budget(cfg, progress.total, progress.faults),
        ),
        executor,
        events,
    )
    if dims is not None:
        _record_failed(store, embedded, [i for i in items if i.name in result.failed], result, dims)
    counts = _summary(cfg, store, embedded, parts)
    _check_budget(cfg, counts["images"], counts["faults"])
    if empty := counts.pop("empty"):
        raise StoreError(f"{', '.join(empty)}: not one image could be used ({counts['faults']})")
    counts["exact_duplicates"] = exact_duplicates(store, embedded)
    if cfg.phash_bits is not None:
        counts["phash_duplicates"] = perceptual_duplicates(store, embedded, cfg.phash_bits)
    for folder, path in (("images", embedded.images_path), ("vectors", embedded.vectors_path)):
        keep = {path(part) for part in parts}
        have = {entry.path for entry in store.list(f"embed/{folder}")}
        delete_all(store, have - keep)
    counts |= {
        "computed": result.computed,
        "reused": result.reused,
        "failed_parts": result.failed,
        "embedding": cfg.embedding,
    }
    return finish(store, StageReport("embed", stage_fingerprint, counts, elapsed()))


def _dims(cfg: EmbedConfig) -> tuple[int, int]:
    """Loads the models here once: a wrong name or file is one clear error, before any worker."""
    semantic, copy = cfg.load()
    cfg.load_filter()
    return semantic.dim, copy.dim


def _record_failed(
    store: Store, embedded: Embedded, failed: list[Item], result: MapResult, dims: tuple[int, int]
) -> None:
    """Images of a part that could not be done get its error as their fault; none is lost."""
    for item in failed:
        part: Part = item.payload
        members = read_table(store, part.table, row_group=part.row_group)
        fault = f"part_failed {result.failed[item.name]}"
        rows = [
            {"key": m["key"], "uri": m["uri"], "bytes": m["size"], "fault": m["fault"] or fault}
            for m in members.to_pylist()
        ]
        table = pa.Table.from_pylist(rows, schema=IMAGES)
        write_table(store, embedded.images_path(part), table)
        write_table(store, embedded.vectors_path(part), vectors(*dims).empty_table())


def retryable(store: Store, embedded: Embedded) -> list[Part]:
    """The finished parts that hold images whose fault may have gone away."""
    have = {entry.path for entry in store.list("embed/images")}
    found = []
    for part in read_parts(store):
        path = embedded.images_path(part)
        faults = read_table(store, path, ["fault"])["fault"].drop_null() if path in have else []
        if any(str(fault).startswith(RETRYABLE) for fault in faults):
            found.append(part)
    return found


def _summary(
    cfg: EmbedConfig, store: Store, embedded: Embedded, parts: list[Part]
) -> dict[str, Any]:
    """Images and rejections, every reason with its count, and the sets that have no image left."""
    counts: dict[str, Any] = {"images": 0, "rejected": 0} | ({"unsafe": 0} if cfg.filter else {})
    reasons: Counter[str] = Counter()
    usable: Counter[str] = Counter()
    columns = ["fault", "unsafe"] if cfg.filter else ["fault"]
    for part, table in overlapped(
        parts, lambda part: read_table(store, embedded.images_path(part), columns)
    ):
        if cfg.filter is not None:
            scores = table["unsafe"].drop_null().to_numpy()
            counts["unsafe"] += int((~(scores < cfg.filter.threshold)).sum())
        faults = [fault.split()[0] for fault in table["fault"].drop_null().to_pylist()]
        reasons.update(faults)
        counts["images"] += part.rows
        counts["rejected"] += len(faults)
        usable[f"sources.{part.role}.{part.set}".rstrip(".")] += part.rows - len(faults)
    empty = [name for name, images in usable.items() if images == 0]
    return counts | {"faults": dict(sorted(reasons.items())), "empty": empty}


def _check_budget(cfg: EmbedConfig, images: int, faults: Mapping[str, int]) -> None:
    """Raises StoreError when the rejections so far are more than the budget for all images."""
    rejected = sum(faults.values())
    if rejected > cfg.min_images and rejected > cfg.max_rejected_share * images:
        raise StoreError(
            f"embed: {rejected} of {images} images were rejected ({dict(faults)}), more than"
            f" failures.max_share = {cfg.max_rejected_share} allows; finished parts are kept"
        )
