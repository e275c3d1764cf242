"""The models of `embed`, and the worker that holds them: one part a call."""

import functools
import gc
import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
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
from curation.runtime.executor import Counts
from curation.runtime.manifest import fingerprint
from curation.runtime.store import compression, open_store, read_uri, write_table
from curation.schema import IMAGES, vectors
from curation.stages.part_bytes import read_part
from curation.stages.tables import Embedded, Part

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
