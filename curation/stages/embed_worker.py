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
import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from curation.images import nvjpeg
from curation.images.decode import BadImage, Limits, decode, examine, extension
from curation.images.encoders import (
    Pixels,
    VectorModel,
    Vectors,
    load_copy_descriptor,
    load_semantic,
)
from curation.images.nvjpeg import Jpeg
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
    decoder: str = "pillow"

    @property
    def embedding(self) -> str:
        """What the vectors depend on, besides the images."""
        models = (self.model, self.precision, self.copy_weights, self.weights_version)
        besides = ("phash",) * (self.phash_bits is not None) + ("compiled",) * self.compile
        besides += (self.decoder,) * (self.decoder != "pillow")
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


Facts = dict[str, Any]  # an image's row of `embed/images`
Inputs = list[Pixels] | Jpeg  # each model's, none for a fault; or what they are still to be made of
Prepared = tuple[int, Inputs]  # with its row


@dataclass(frozen=True)
class Batch:
    """Rows, and each model's (B, 3, S, S) uint8 input."""

    rows: list[int]
    inputs: list[Pixels] | list[Tensor]


Started = tuple[Batch, list[Callable[[], Vectors]]]  # and what waits for the vectors


class EmbedWorker:
    """Holds the models; embeds one part a call."""

    def __init__(self, cfg: EmbedConfig, run_uri: str) -> None:
        self._cfg, self._store = cfg, open_store(run_uri)
        self._embedded = Embedded(cfg.embedding)
        self._semantic, self._copy = cfg.load()
        self._filter = cfg.load_filter()
        self._device = self._semantic.device
        if cfg.decoder == "nvjpeg":
            nvjpeg.require(self._device)
        on_gpu = self._device.type == "cuda"
        self._decode_threads = GPU_DECODE_THREADS if on_gpu else 0
        self._ahead = int(on_gpu)  # batches that a GPU has while the one before is written

    def __call__(self, part: Part) -> Counts:
        images: list[Facts] = []
        schema = vectors(self._semantic.dim, self._copy.dim)
        faults: Counter[str] = Counter()
        vectors_path = self._embedded.vectors_path(part)
        with self._store.publish(vectors_path) as scratch:
            with pq.ParquetWriter(scratch, schema, compression=compression(schema)) as writer:
                started: deque[Started] = deque()
                for batch in self._batches(part, images):
                    started.append((batch, self._start(batch)))
                    if len(started) > self._ahead:
                        self._finish(started.popleft(), images, writer, schema)
                for one in started:
                    self._finish(one, images, writer, schema)
            faults.update(i["fault"].split()[0] for i in images if i["fault"])
            # The vectors appear last: where they are, the images are there too.
            table = pa.Table.from_pylist(images, schema=IMAGES)
            write_table(self._store, self._embedded.images_path(part), table)
        return {"images": len(images), "faults": dict(faults)}

    def _batches(self, part: Part, images: list[Facts]) -> Iterator[Batch]:
        """Full ones but for the last, and for JPEGs that prove damaged when their turn comes.

        Facts of every image are added to `images`.
        """
        waiting: list[Prepared] = []
        for row, found, inputs in self._prepared(part):
            images.append(found)
            if inputs:
                waiting.append((row, inputs))
            if len(waiting) == self._cfg.batch:
                yield from self._batch(waiting, images)
                waiting = []
        yield from self._batch(waiting, images)

    def _batch(self, waiting: list[Prepared], images: list[Facts]) -> Iterator[Batch]:
        """One, unless it would be empty: what was made on the GPU comes first."""
        jpegs = {row: inputs for row, inputs in waiting if isinstance(inputs, Jpeg)}
        by_pillow = {row: inputs for row, inputs in waiting if not isinstance(inputs, Jpeg)}
        forms = (self._semantic.form, self._copy.form)
        batches = [Batch(*made) for made in nvjpeg.inputs(jpegs, forms, self._device)]
        made = {row for batch in batches for row in batch.rows}
        for row in jpegs.keys() - made:
            images[row], inputs = self._decode(images[row], jpegs[row].data)
            if inputs:
                by_pillow[row] = inputs
        if by_pillow:
            stacked = [np.stack(one) for one in zip(*by_pillow.values(), strict=True)]
            batches.append(Batch(list(by_pillow), stacked))
        if batches:
            yield batches[0] if len(batches) == 1 else _joined(batches, self._device)

    def _prepared(self, part: Part) -> Iterator[tuple[int, Facts, Inputs]]:
        """Row, facts and inputs of every image, in order.

        While a GPU computes, threads decode the next two batches.
        """
        read = read_part(self._store, part, self._cfg.limits.max_bytes)
        if not self._decode_threads:
            for row, member, data in read:
                yield row, *self._prepare(member, data)
            return
        with ThreadPoolExecutor(self._decode_threads) as pool:
            coming: deque[tuple[int, Future[tuple[Facts, Inputs]]]] = deque()
            for row, member, data in read:
                coming.append((row, pool.submit(self._prepare, member, data)))
                if len(coming) > 2 * self._cfg.batch:
                    row, future = coming.popleft()
                    yield row, *future.result()
            for row, future in coming:
                yield row, *future.result()

    def _prepare(self, member: dict[str, Any], data: bytes | str) -> tuple[Facts, Inputs]:
        """`data` may be the fault itself."""
        facts: Facts = {"id": None, "key": member["key"], "uri": member["uri"], "ext": None}
        facts |= {"bytes": member["size"], "width": None, "height": None, "fault": None}
        facts |= {"unsafe": None, "phash": None, "checksum": None}
        if isinstance(data, str):
            return facts | {"fault": data}, []
        facts |= {"id": hashlib.sha256(data).digest(), "bytes": len(data)}
        facts["checksum"] = xxh3_64_intdigest(data)
        if self._cfg.decoder == "pillow":
            return self._decode(facts, data)
        try:
            image = examine(data, self._cfg.limits)
        except BadImage as error:
            return facts | {"fault": str(error)}, []
        if not nvjpeg.eligible(image, data):
            return self._decode(facts, data)
        facts |= {"ext": extension(image), "width": image.width, "height": image.height}
        return facts, Jpeg(data, image.width * image.height)

    def _decode(self, facts: Facts, data: bytes) -> tuple[Facts, list[Pixels]]:
        """By Pillow: the facts completed, and each model's input unless the image has a fault."""
        try:
            decoded = decode(data, self._cfg.limits)
        except BadImage as error:
            fault = {"ext": None, "width": None, "height": None, "fault": str(error)}
            return facts | fault, []
        found: Facts = {"ext": decoded.ext, "width": decoded.width, "height": decoded.height}
        if self._cfg.phash_bits is not None:
            found["phash"] = phash(decoded.pixels)
        models = (self._semantic, self._copy, self._filter)
        return facts | found, [model.prepare(decoded.pixels) for model in models if model]

    def _start(self, batch: Batch) -> list[Callable[[], Vectors]]:
        """Gives a batch to both models."""
        models = (self._semantic, self._copy)
        return [model.start(batch.inputs[which]) for which, model in enumerate(models)]

    def _finish(
        self,
        started: Started,
        images: list[Facts],
        writer: pq.ParquetWriter,
        schema: pa.Schema,
    ) -> None:
        """Streams the vectors of a batch; rows that aren't finite become a fault."""
        batch, waiting = started
        columns = [rows().astype(np.float16) for rows in waiting]
        # A row is unit-norm unless the network gave zeros, infinities or NaN (whose norm is NaN).
        norms = [np.linalg.norm(rows.astype(np.float32), axis=1) for rows in columns]
        good = (np.abs(norms[0] - 1) < 0.01) & (np.abs(norms[1] - 1) < 0.01)
        numbers = np.array(batch.rows, np.int32)
        for row in numbers[~good]:
            images[row]["fault"] = "no_vector a model gave zeros or no finite numbers"
        if self._filter is not None:
            good &= self._judge(self._filter, batch, images)
        kept = np.flatnonzero(good)
        kept = kept[np.argsort(numbers[kept])]
        arrays = [pa.array(numbers[kept])]
        for rows, name in zip(columns, ("semantic", "copy"), strict=True):
            arrays.append(_pack(rows[kept], schema.field(name).type))
        writer.write_table(pa.Table.from_arrays(arrays, schema=schema))

    def _judge(
        self, judge: SafetyFilter, batch: Batch, images: list[Facts]
    ) -> npt.NDArray[np.bool_]:
        """Notes the scores; False for images that are dropped, among them those without one."""
        scores = judge(np.asarray(batch.inputs[2]))
        safe = scores < judge.cfg.threshold  # NaN is not
        for row, score, fine in zip(batch.rows, scores.tolist(), safe, strict=True):
            images[row]["unsafe"] = score
            if judge.cfg.mode == "drop" and not fine:
                images[row]["fault"] = (
                    f"unsafe score {score:.3f}, must be below {judge.cfg.threshold}"
                )
        return safe | (judge.cfg.mode != "drop")


def _joined(batches: list[Batch], device: torch.device) -> Batch:
    rows = [row for batch in batches for row in batch.rows]
    there = [[torch.as_tensor(one, device=device) for one in batch.inputs] for batch in batches]
    return Batch(rows, [torch.cat(of_model) for of_model in zip(*there, strict=True)])


def _pack(rows: npt.NDArray[np.float16], kind: pa.DataType) -> pa.Array:
    buffer = pa.py_buffer(np.ascontiguousarray(rows).tobytes())
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(rows), [None, buffer])
