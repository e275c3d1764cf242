"""Tiles of work on one thread or several, and memory that each thread uses again.

Tiles don't depend on the number of threads, so results don't either.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

_scratch = threading.local()


def each_tile(count: int, tile: int, work: Callable[[int, int], None]) -> None:
    """work(start, stop) for consecutive tiles of 0 .. count, on as many threads as torch has."""
    spans = [(start, min(start + tile, count)) for start in range(0, count, tile)]
    each(len(spans), lambda number: work(*spans[number]))


def each(count: int, work: Callable[[int], None]) -> None:
    """work(i) for 0 .. count - 1 on as many threads as torch has, each product by one of them."""
    with one_a_product() as threads:
        if min(threads, count) <= 1:
            for number in range(count):
                work(number)
        else:
            for _ in _pool(min(threads, count)).map(work, range(count)):
                pass


@contextlib.contextmanager
def one_a_product() -> Iterator[int]:
    """Torch itself computes on one thread meanwhile; yields how many `each` takes.

    Of small products and sums torch's own threads spend their time waiting for each other, which
    on a busy machine takes longer than the work by far.
    """
    outer: int | None = getattr(_scratch, "threads", None)
    if outer is not None:
        yield outer
        return
    before = torch.get_num_threads()
    _scratch.threads = before
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        _scratch.threads = None
        torch.set_num_threads(before)


def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept by whoever calls: k-means asks for threads a hundred times an iteration.

    A forked child has another id, and none of its parent's threads.
    """
    kept_for = threads, threading.get_native_id()
    if getattr(_scratch, "pool_kept_for", None) != kept_for:
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        _scratch.pool_kept_for, _scratch.pool = kept_for, pool
    kept: ThreadPoolExecutor = _scratch.pool
    return kept


def buffer(name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Memory that a thread uses again: fresh pages for every tile would cost more than the sums."""
    kept = f"{name} {dtype}"
    have = getattr(_scratch, kept, None)
    if have is None or have.numel() < shape[0] * shape[1]:
        have = torch.empty(shape[0] * shape[1], dtype=dtype)
        setattr(_scratch, kept, have)
    flat: torch.Tensor = have
    return flat[: shape[0] * shape[1]].view(shape)
