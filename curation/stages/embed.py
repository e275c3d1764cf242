"""Parts -> images and vectors: reads each image once, checks it, and embeds it with both models.

Outputs are content-addressed by the part and the models, so that a changed recipe embeds only what
it touches. Images with the same bytes are found here, over the whole pool, and on request those
with near perceptual hashes.
"""

import functools
import gc
import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curation.images.decode import BadImage, Decoded, Limits, decode
from curation.images.encoders import (
    Pixels,
    VectorModel,
    Vectors,
    load_copy_descriptor,
    load_semantic,
)
from curation.images.perceptual import phash
from curation.images.safety import FilterConfig, SafetyFilter
from curation.runtime.events import Events
from curation.runtime.executor import Counts, Executor, Item, MapResult, Work, map_parts, timer
from curation.runtime.manifest import StageReport, begin, fingerprint, finish
from curation.runtime.store import (
    Store,
    StoreError,
    compression,
    delete_all,
    open_store,
    read_table,
    read_uri,
    write_table,
)
from curation.schema import IMAGES, vectors
from curation.stages.exact import exact_duplicates
from curation.stages.part_bytes import read_part
from curation.stages.perceptual import perceptual_duplicates
from curation.stages.tables import Embedded, Part, overlapped, read_parts

# Faults that may go away by themselves: `curate retry` tries these images again.
RETRYABLE = ("part_failed", "unreadable")
GPU_DECODE_THREADS = 6  # a worker, while its GPU computes: nodes with eight have 40 to 96 cores


@dataclass(frozen=True)
class EmbedConfig:
    """Models, limits and the failure budget. `weights_version` identifies the weights' content."""

    model: str
    weights: str
    precision: str
    batch: int
    copy_weights: str
    weights_version: str
    limits: Limits
    max_rejected_share: float
    min_images: int
    filter: FilterConfig | None = None
    phash_bits: int | None = None
    compile: bool = False

    @property
    def embedding(self) -> str:
        """What the vectors depend on, besides the images."""
        models = (self.model, self.precision, self.copy_weights, self.weights_version)
        besides = ("phash",) * (self.phash_bits is not None) + ("compiled",) * self.compile
        return fingerprint(models, asdict(self.limits), *self._filtered(), *besides)

    def _filtered(self) -> tuple[Any, ...]:
        return () if self.filter is None else (asdict(self.filter),)

    def load(self) -> tuple[VectorModel, VectorModel]:
        """The semantic encoder and the copy descriptor. Raises EncoderError or StoreError."""
        weights = None if self.weights in ("hub", "builtin") else read_uri(self.weights)
        copy = None if self.copy_weights == "builtin" else read_uri(self.copy_weights)
        _keep_libraries()
        full = self.batch if self.compile else None
        semantic = load_semantic(self.model, weights, self.precision, full)
        return semantic, load_copy_descriptor(copy)

    def load_filter(self) -> SafetyFilter | None:
        """The classifier of sensitive images, if there is one. Raises as `load` does."""
        if self.filter is None:
            return None
        return SafetyFilter(self.filter, read_uri(self.filter.weights))


@functools.cache
def _keep_libraries() -> None:
    """Takes half a million objects of torch and timm, which stay, out of garbage collection: every
    full one would look at them all, for a quarter of a second."""
    import timm  # noqa: F401 (not at the top: only this stage needs it)

    gc.freeze()


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


Prepared = tuple[int, list[Pixels]]  # row, and each model's input
Started = tuple[list[Prepared], list[Callable[[], Vectors]]]  # and what waits for the vectors


class EmbedWorker:
    """Holds the models; embeds one part a call."""

    def __init__(self, cfg: EmbedConfig, run_uri: str) -> None:
        self._cfg, self._store = cfg, open_store(run_uri)
        self._embedded = Embedded(cfg.embedding)
        self._semantic, self._copy = cfg.load()
        self._filter = cfg.load_filter()
        on_gpu = self._semantic.device.type == "cuda"
        self._decode_threads = GPU_DECODE_THREADS if on_gpu else 0
        self._ahead = int(on_gpu)  # batches that a GPU has while the one before is written

    def __call__(self, part: Part) -> Counts:
        images: list[dict[str, Any]] = []
        schema = vectors(self._semantic.dim, self._copy.dim)
        faults: Counter[str] = Counter()
        vectors_path = self._embedded.vectors_path(part)
        with self._store.publish(vectors_path) as scratch:
            with pq.ParquetWriter(scratch, schema, compression=compression(schema)) as writer:
                started: deque[Started] = deque()
                for batch in self._batches(part, images):
                    started.append(self._start(batch))
                    if len(started) > self._ahead:
                        self._finish(started.popleft(), images, writer, schema)
                for one in started:
                    self._finish(one, images, writer, schema)
            faults.update(i["fault"].split()[0] for i in images if i["fault"])
            # The vectors appear last: where they are, the images are there too.
            table = pa.Table.from_pylist(images, schema=IMAGES)
            write_table(self._store, self._embedded.images_path(part), table)
        return {"images": len(images), "faults": dict(faults)}

    def _batches(self, part: Part, images: list[dict[str, Any]]) -> Iterator[list[Prepared]]:
        """Full ones but for the last; facts of every image are added to `images`."""
        batch: list[Prepared] = []
        for row, found, inputs in self._prepared(part):
            images.append(found)
            if inputs:
                batch.append((row, inputs))
            if len(batch) == self._cfg.batch:
                yield batch
                batch = []
        if batch:
            yield batch

    def _prepared(self, part: Part) -> Iterator[tuple[int, dict[str, Any], list[Pixels]]]:
        """Row, facts and each model's input (none for a fault) of every image, in order.

        While a GPU computes, threads decode the next two batches.
        """
        read = read_part(self._store, part, self._cfg.limits.max_bytes)
        if not self._decode_threads:
            for row, member, data in read:
                yield row, *self._prepare(member, data)
            return
        with ThreadPoolExecutor(self._decode_threads) as pool:
            coming: deque[tuple[int, Future[tuple[dict[str, Any], list[Pixels]]]]] = deque()
            for row, member, data in read:
                coming.append((row, pool.submit(self._prepare, member, data)))
                if len(coming) > 2 * self._cfg.batch:
                    row, future = coming.popleft()
                    yield row, *future.result()
            for row, future in coming:
                yield row, *future.result()

    def _prepare(
        self, member: dict[str, Any], data: bytes | str
    ) -> tuple[dict[str, Any], list[Pixels]]:
        found, decoded = self._examine(member, data)
        if decoded is None:
            return found, []
        models = (self._semantic, self._copy, self._filter)
        return found, [model.prepare(decoded.pixels) for model in models if model]

    def _examine(
        self, member: dict[str, Any], data: bytes | str
    ) -> tuple[dict[str, Any], Decoded | None]:
        """The image's row, and its pixels unless it has a fault. `data` may be the fault itself."""
        row = {"id": None, "key": member["key"], "uri": member["uri"], "ext": None}
        row |= {"bytes": member["size"], "width": None, "height": None, "fault": None}
        row |= {"unsafe": None, "phash": None}
        if isinstance(data, str):
            return {**row, "fault": data}, None
        row |= {"id": hashlib.sha256(data).digest(), "bytes": len(data)}
        try:
            decoded = decode(data, self._cfg.limits)
        except BadImage as error:
            return {**row, "fault": str(error)}, None
        if self._cfg.phash_bits is not None:
            row["phash"] = phash(decoded.pixels)
        return row | {
            "ext": decoded.ext,
            "width": decoded.width,
            "height": decoded.height,
        }, decoded

    def _start(self, batch: list[Prepared]) -> Started:
        """Gives a batch to both models."""
        rows = []
        for which, model in enumerate((self._semantic, self._copy)):
            rows.append(model.start(np.stack([inputs[which] for _, inputs in batch])))
        return batch, rows

    def _finish(
        self,
        started: Started,
        images: list[dict[str, Any]],
        writer: pq.ParquetWriter,
        schema: pa.Schema,
    ) -> None:
        """Streams the vectors of a batch; rows that aren't finite become a fault."""
        batch = started[0]
        columns = [rows().astype(np.float16) for rows in started[1]]
        # A row is unit-norm unless the network gave zeros, infinities or NaN (whose norm is NaN).
        norms = [np.linalg.norm(rows.astype(np.float32), axis=1) for rows in columns]
        good = (np.abs(norms[0] - 1) < 0.01) & (np.abs(norms[1] - 1) < 0.01)
        for row, _ in (pair for pair, fine in zip(batch, good, strict=True) if not fine):
            images[row]["fault"] = "no_vector a model gave zeros or no finite numbers"
        if self._filter is not None:
            good &= self._judge(self._filter, batch, images)
        numbers = np.array([row for row, _ in batch], np.int32)[good]
        arrays = [pa.array(numbers)]
        for rows, name in zip(columns, ("semantic", "copy"), strict=True):
            arrays.append(_pack(rows[good], schema.field(name).type))
        writer.write_table(pa.Table.from_arrays(arrays, schema=schema))

    def _judge(
        self, judge: SafetyFilter, batch: list[Prepared], images: list[dict[str, Any]]
    ) -> npt.NDArray[np.bool_]:
        """Notes the scores; False for images that are dropped, among them those without one."""
        scores = judge(np.stack([inputs[2] for _, inputs in batch]))
        safe = scores < judge.cfg.threshold  # NaN is not
        for (row, _), score, fine in zip(batch, scores.tolist(), safe, strict=True):
            images[row]["unsafe"] = score
            if judge.cfg.mode == "drop" and not fine:
                images[row]["fault"] = (
                    f"unsafe score {score:.3f}, must be below {judge.cfg.threshold}"
                )
        return safe | (judge.cfg.mode != "drop")


def _pack(rows: npt.NDArray[np.float16], kind: pa.DataType) -> pa.Array:
    buffer = pa.py_buffer(np.ascontiguousarray(rows).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(rows), [None, buffer])


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
