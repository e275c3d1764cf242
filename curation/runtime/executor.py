"""Work over parts: the Executor protocol, the in-process one, and `map_parts` for all stages.

A worker is a plain class: `__init__` loads what it needs once, `__call__(item)` does one part,
writes its output to the store and returns counts. What a part did is in the store, not in memory.
"""

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from curation.runtime.events import Events, Progress
from curation.runtime.store import DISK_FULL, StoreError

FATAL = (DISK_FULL, "EncoderError: ")  # these would fail the other parts as well
Counts = dict[str, Any]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


class Worker(Protocol):
    def __call__(self, item: Any, /) -> Counts: ...


MakeWorker = Callable[[], Worker]


@dataclass(frozen=True)
class Outcome:
    """What became of item number `item`: its counts, or the error that stopped it."""

    item: int
    counts: Counts | None
    error: str = ""


class Executor(Protocol):
    """Maps items over workers; outcomes come in any order, one for every item."""

    workers: int

    def map(
        self, make_worker: MakeWorker, items: Sequence[Any], gpu: bool = False
    ) -> Iterator[Outcome]:
        """`gpu`: give each worker a GPU where the cluster has any."""
        ...

    def close(self) -> None: ...


def describe(error: BaseException) -> str:
    """An error as one line: its type unless the message is made for people."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, StoreError) else f"{type(error).__name__}: {text}"


def one_thread() -> None:
    """One maths thread a process: results must not depend on how many cores a machine has."""
    import torch

    torch.set_num_threads(1)
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Tells glibc to keep up to a gigabyte of what is freed.

    A model frees and asks for the same tens of megabytes at every layer; given back to the system
    each time they are cleared anew, up to a third of the time of a small model's batch.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """Maths threads on every core for a while: what is done then must not depend on them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class InProcessExecutor:
    """One worker, here: for tests and for jobs too small to start Ray for."""

    workers = 1

    def map(
        self,
        make_worker: MakeWorker,
        items: Sequence[Any],
        gpu: bool = False,  # noqa: ARG002 (models take a GPU that is there by themselves)
    ) -> Iterator[Outcome]:
        if not items:
            return
        worker = make_worker()
        for number, item in enumerate(items):
            try:
                outcome = Outcome(number, worker(item))
            except Exception as error:  # the part boundary: recorded, the rest goes on
                outcome = Outcome(number, None, describe(error))
            yield outcome

    def close(self) -> None:
        return


@dataclass(frozen=True)
class Item:
    """One unit of work for `map_parts`: a name for people, its images, and what the worker gets."""

    name: str
    images: int
    payload: Any


@dataclass
class MapResult:
    """Items computed now, items reused, and those that failed with why."""

    computed: int = 0
    reused: int = 0
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """Items of one stage, which of them are finished, and what makes a worker for the others.

    `gpu`: workers use a GPU where there is one. `check` sees the progress after every part and may
    raise StoreError to stop.
    """

    stage: str
    items: Sequence[Item]
    finished: Callable[[Item], bool]
    make_worker: MakeWorker
    gpu: bool = False
    check: Callable[[Progress], None] | None = None


def map_parts(work: Work, executor: Executor, events: Events) -> MapResult:
    """Runs every item that is not finished yet, with progress. Failures are returned, not raised.

    Workers return counts; the key `faults` (reason -> images) goes to the progress.
    """
    result = MapResult()
    images = sum(item.images for item in work.items)
    progress = Progress(events, work.stage, images, executor.workers)
    todo = []
    for item in work.items:
        if work.finished(item):
            result.reused += 1
            progress.skip(item.images)
        else:
            todo.append(item)
    try:
        for outcome in executor.map(work.make_worker, [i.payload for i in todo], work.gpu):
            item = todo[outcome.item]
            if outcome.counts is None:
                if any(text in outcome.error for text in FATAL):
                    raise StoreError(outcome.error)
                result.failed[item.name] = outcome.error
                progress.fail(item.name, item.images, outcome.error)
                continue
            result.computed += 1
            progress.add(item.name, item.images, outcome.counts.get("faults", {}))
            if work.check is not None:
                work.check(progress)
    finally:
        progress.close()
    return result


def require_all(result: MapResult, stage: str) -> None:
    """For stages that can't go on without every part. Raises StoreError with the first reasons."""
    if result.failed:
        shown = "; ".join(f"{name}: {why}" for name, why in list(result.failed.items())[:3])
        raise StoreError(
            f"{stage}: {len(result.failed)} of {len(result.failed) + result.computed} parts failed"
            f" ({shown}). Finished parts are kept: run again to try the others."
        )


def timer() -> Callable[[], float]:
    """Seconds since now."""
    start = time.monotonic()
    return lambda: round(time.monotonic() - start, 3)
