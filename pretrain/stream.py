"""The endless stream of batches that a rank trains on: shuffled, resumable, equal everywhere.

Step t of a run that (re)starts at position P hands out the positions P + t * W * B to before
P + (t + 1) * W * B: rank r of W takes the B of them from r * B on. A worker makes whole batches,
and DataLoader returns them in turn, so that order and bytes don't depend on the workers.
"""

import itertools
import json
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pretrain import distributed
from pretrain.collate import BadSample, Batch, Decoded, collate
from pretrain.crops import CropConfig
from pretrain.decode import BadImage, decode
from pretrain.errors import UserError
from pretrain.order import Order, augmentation_rng
from pretrain.samples import Sample, Source
from pretrain.workers import Failure, receive

REPLACEMENTS = 20  # in a row: more than chance
READERS = {False: 1, True: 16}  # threads a worker, by whether the source is remote
LEAST_SEEN = 1_000  # images for which the share of bad ones is taken
BATCHES_AHEAD = 2  # a worker


@dataclass(frozen=True)
class StreamConfig:
    """`batch` images a rank and step; about `window` samples are shuffled together."""

    batch: int
    seed: int = 0
    window: int = 1 << 17
    workers: int = 4
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        for name, least in {"batch": 1, "seed": 0, "window": 1, "workers": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)}: must be at least {least}")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"max_bad_share {self.max_bad_share}: must be from 0 to 1")


class Batches(IterableDataset[Batch | Failure]):
    """What one rank is given from `start` on; iterated in a worker, each k-th batch of it."""

    def __init__(
        self, source: Source, crops: CropConfig, cfg: StreamConfig, start: int, stride: int
    ) -> None:
        """`start` is the first position of this rank, `stride` how far it goes on each step."""
        self._source, self._crops, self._cfg = source, crops, cfg
        self._start, self._stride = start, stride
        self._order = Order(source.counts, cfg.seed, cfg.window)

    def __iter__(self) -> Iterator[Batch | Failure]:
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        starts = (self._start + step * self._stride for step in itertools.count(first, every))
        try:
            with ThreadPoolExecutor(READERS[self._source.remote]) as readers:
                for start, reads in self._read_ahead(starts, readers):
                    yield self._batch(start, reads)
        except UserError as error:
            yield Failure(str(error))

    def _read_ahead(
        self, starts: Iterator[int], readers: ThreadPoolExecutor
    ) -> Iterator[tuple[int, list[Future[Sample]]]]:
        """The bytes of a batch are read while the one before it is decoded."""
        under_way: deque[tuple[int, list[Future[Sample]]]] = deque()
        for start in starts:
            numbers = self._order.samples(start, start + self._cfg.batch).tolist()
            reads = [readers.submit(self._source.read, number) for number in numbers]
            under_way.append((start, reads))
            if len(under_way) > 1:
                yield under_way.popleft()

    def _batch(self, start: int, reads: list[Future[Sample]]) -> Batch:
        bad: list[BadSample] = []
        images = (
            self._decoded(position, read.result(), bad)
            for position, read in enumerate(reads, start)
        )
        return collate(images, len(reads), start, self._crops)._replace(bad=bad)

    def _decoded(self, position: int, sample: Sample, bad: list[BadSample]) -> Decoded:
        """The sample, or the first of its replacements that can be decoded."""
        for attempt in range(REPLACEMENTS):
            try:
                pixels = decode(sample.data)
            except BadImage as error:
                bad.append(BadSample(sample.shard, sample.key, str(error), position))
                sample = self._source.read(self._order.replacement(position, attempt))
                continue
            return Decoded(sample.key, pixels, augmentation_rng(self._cfg.seed, position))
        raise UserError(
            f"{self._source.uri}: {REPLACEMENTS} images in a row can't be decoded, the last is "
            f"{bad[-1].key} ({bad[-1].reason}); is this the right data?"
        )


class Loader:
    """An endless iterator over the batches of one rank.

    `position` is all there is to resume; `waited_s` is the time spent in `next`, and `bad` counts
    images that this loader replaced, by reason. Errors while iterating: UserError.
    """

    def __init__(
        self,
        source: Source,
        crops: CropConfig,
        cfg: StreamConfig,
        rank: int = 0,
        world_size: int = 1,
        state: dict[str, Any] | None = None,
        names: Path | None = None,
    ) -> None:
        """`state`: what `state()` of any rank said, whatever its world size and batch were.

        All ranks append the images that they replace to `names`, a line of JSON each; what it says
        of positions that are still to come is removed, and `bad_before` counts the rest.
        """
        self._rank, self._names = rank, names
        self._source, self._cfg = source, cfg
        self._step_images = world_size * cfg.batch
        self._made_of = f"{source.fingerprint}-{cfg.seed}-{cfg.window}"
        self.position = self._resume(state) if state else 0
        self.samples_per_epoch = int(source.counts.sum())
        self.waited_s, self._since = 0.0, time.monotonic()
        self.seen, self.bad = 0, dict[str, int]()
        self.bad_before = _forget(names, self.position, rank == 0) if names else 0
        start = self.position + rank * cfg.batch
        self._iterator: Iterator[Batch | Failure] = iter(
            DataLoader(
                Batches(source, crops, cfg, start, self._step_images),
                batch_size=None,
                num_workers=cfg.workers,
                prefetch_factor=BATCHES_AHEAD if cfg.workers else None,
                pin_memory=torch.cuda.is_available(),
            )
        )

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        began = time.monotonic()
        batch = receive(self._iterator, self._cfg.workers)
        self.waited_s += time.monotonic() - began
        self.position += self._step_images
        self._count(batch)
        return batch

    @property
    def waiting_share(self) -> float:
        """Share of the wall time since this loader was made that went by in `next`."""
        return self.waited_s / max(time.monotonic() - self._since, 1e-9)

    def state(self) -> dict[str, Any]:
        """The position of the next step, and a name for the order that it is a position in."""
        return {"position": self.position, "order": self._made_of}

    def _resume(self, state: dict[str, Any]) -> int:
        if state["order"] != self._made_of:
            raise UserError(
                f"{self._source.uri}: the checkpoint was made with other shards, seed or window "
                f"(its order is {state['order']}, this one {self._made_of}); give the same, or "
                "start anew"
            )
        return int(state["position"])

    def _count(self, batch: Batch) -> None:
        self.seen += len(batch.keys)
        if batch.bad and self._names is not None:
            lines = [json.dumps({"rank": self._rank, **one._asdict()}) + "\n" for one in batch.bad]
            with self._names.open("a") as file:
                file.write("".join(lines))
        for sample in batch.bad:
            reason = sample.reason.partition(" ")[0]
            self.bad[reason] = self.bad.get(reason, 0) + 1
        total, share = sum(self.bad.values()), self._cfg.max_bad_share
        if batch.bad and total > share * max(self.seen, LEAST_SEEN):
            last = batch.bad[-1]
            raise UserError(
                f"{self._source.uri}: {total} of {self.seen} images can't be decoded, more than "
                f"max_bad_share {share:g}; the last is {last.key} in {last.shard}: {last.reason}"
            )


def _forget(names: Path, position: int, writes: bool) -> int:
    """How many bad samples were before a position; the first rank drops the others."""
    kept = []
    for line in names.read_text().splitlines() if names.exists() else ():
        try:
            if json.loads(line)["position"] < position:
                kept.append(line + "\n")
        except (ValueError, KeyError):  # cut short by a kill
            continue
    distributed.barrier()  # all have read it
    if writes and names.exists():
        partial = names.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(names)
    distributed.barrier()  # none writes yet
    return len(kept)
