"""The only file that imports ray: actors over parts.

Each actor holds one worker (the model is loaded once) and has at most two items, so that the next
one is there when the first ends. The bookkeeping is here, not in Ray's queues: an actor that dies
gives its items back and is replaced, so that a lost node never takes work with it; actors that
can't be placed simply get none; nodes that join are used. Actors outlive a `map`, since to start
one takes seconds and an iteration of k-means is a `map`.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from curation.runtime.executor import MakeWorker, Outcome, describe, one_thread
from curation.runtime.store import StoreError

IN_FLIGHT = 2
ATTEMPTS = 3
FAILED_STARTS = 10  # in a row, before it is the workers' environment and not a lost node
POLL_S = 1.0
RESIZE_S = 10.0
AHEAD = 8  # actors for which there is no room yet: an autoscaler sees them, and makes some


class _Actor:
    def __init__(self) -> None:
        one_thread()

    def join(self, make_worker: MakeWorker) -> None:
        """Leaves the `map` before, and frees its worker."""
        self._make_worker = make_worker
        self._worker: Any = None

    def work(self, item: Any) -> Any:
        if self._worker is None:
            self._worker = self._make_worker()
        return self._worker(item)


class RayExecutor:
    """`address`: `local` for a Ray of its own on this machine, else a cluster (`auto`, a port)."""

    def __init__(self, address: str, workers: int | None = None) -> None:
        try:
            ray.init(
                address=address,
                num_cpus=workers if address == "local" else None,
                include_dashboard=False if address == "local" else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise StoreError(
                f"--ray {address}: no Ray cluster answers there ({type(error).__name__}:"
                f" {' '.join(str(error).split())[:200]}); use an address, `local` or `off`"
            ) from None
        self._limit = workers
        self._grows = address != "local"
        self._resting: dict[bool, list[Any]] = {}  # with a GPU or without -> actors of no `map`
        self.workers = self._capacity(gpu=False)

    def _capacity(self, gpu: bool) -> int:
        """Workers that the cluster has room for now."""
        fits = int(_resources().get("GPU" if gpu else "CPU", 1))
        return max(1, min(fits, self._limit or fits))

    def _wanted(self) -> int:
        """Actors to ask for: as many again as there is room for, so that a cluster may double."""
        ahead = max(AHEAD, self.workers) if self._grows else 0
        return min(self.workers + ahead, self._limit or self.workers + ahead)

    def map(
        self, make_worker: MakeWorker, items: Sequence[Any], gpu: bool = False
    ) -> Iterator[Outcome]:
        gpu = gpu and _resources().get("GPU", 0) >= 1
        if not items:
            return
        for actor in self._resting.pop(not gpu, []):  # they hold CPUs that these may need
            ray.kill(actor)
        pool = _Pool(make_worker, items, int(gpu), self._resting.pop(gpu, []))
        try:
            resized = 0.0
            while pool.unfinished:
                if time.monotonic() - resized > RESIZE_S:
                    self.workers, resized = self._capacity(gpu), time.monotonic()
                pool.grow(min(self._wanted(), pool.unfinished))
                yield from pool.step()
        finally:
            self._resting[gpu] = pool.close(self.workers)

    def close(self) -> None:
        ray.shutdown()


def _resources() -> dict[str, float]:
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return have


class _Pool:
    """Items and actors of one `map`."""

    def __init__(
        self, make_worker: MakeWorker, items: Sequence[Any], gpus: int, resting: Sequence[Any]
    ) -> None:
        self._make_worker, self._items = ray.put(make_worker), items
        self._class: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(_Actor)
        self._queue = deque(range(len(items)))
        self._attempts = [0] * len(items)
        self._running: dict[Any, tuple[Any, int]] = {}  # result ref -> (actor, item)
        self._starting: dict[Any, Any] = {}  # joining ref -> actor
        self._held: dict[Any, list[int]] = {}  # joined actor -> its items, the running one first
        self._failed_starts = 0
        self.unfinished = len(items)
        for actor in resting:
            self._start(actor)

    def grow(self, wanted: int) -> None:
        for _ in range(wanted - len(self._held) - len(self._starting)):
            self._start(self._class.remote())

    def _start(self, actor: Any) -> None:
        self._starting[actor.join.remote(self._make_worker)] = actor

    def step(self) -> list[Outcome]:
        """Hands out work, waits a moment, and collects what has ended."""
        for actor, held in self._held.items():
            while len(held) < IN_FLIGHT and self._queue:
                item = self._queue.popleft()
                self._running[actor.work.remote(self._items[item])] = (actor, item)
                held.append(item)
        refs = [*self._running, *self._starting]
        ended, _ = ray.wait(refs, num_returns=1, timeout=POLL_S)
        outcomes = [self._collect(ref) for ref in ended]
        return [outcome for outcome in outcomes if outcome is not None]

    def _collect(self, ref: Any) -> Outcome | None:
        if ref in self._starting:
            self._started(self._starting.pop(ref), ref)
            return None
        actor, item = self._running.pop(ref)
        try:
            outcome = Outcome(item, ray.get(ref))
        except RayTaskError as error:
            outcome = Outcome(item, None, describe(getattr(error, "cause", error)))
        except RayError as error:  # the actor, its worker process or its node is gone
            held = self._held.pop(actor, [])
            if held:  # only the item that was running can be to blame
                self._attempts[held[0]] += 1
            return self._lost(item, error)
        if actor in self._held:
            self._held[actor].remove(item)
        self.unfinished -= 1
        return outcome

    def _started(self, actor: Any, joined: Any) -> None:
        """An actor that could not start is replaced by the next `grow`."""
        try:
            ray.get(joined)
        except RayError as error:
            ray.kill(actor)
            self._failed_starts += 1
            if self._failed_starts < FAILED_STARTS:
                return
            raise StoreError(
                f"{FAILED_STARTS} workers in a row could not start; is the same environment"
                f" installed on every node? ({describe(error)})"
            ) from None
        self._failed_starts = 0
        self._held[actor] = []

    def _lost(self, item: int, error: RayError) -> Outcome | None:
        """The worker died with this item: try again elsewhere, a few times."""
        if self._attempts[item] < ATTEMPTS:
            self._queue.appendleft(item)
            return None
        self.unfinished -= 1
        why = str(error).partition("\n")[0]  # what follows are ids, which differ from run to run
        return Outcome(item, None, f"worker_died: {ATTEMPTS} workers died on this part ({why})")

    def close(self, room: int) -> list[Any]:
        """Actors that are free for another `map`, at most `room`; the others are killed."""
        free = [actor for actor, held in self._held.items() if not held]
        kept = [*free, *self._starting.values()][:room]
        for actor in [*self._held, *self._starting.values()]:
            if actor not in kept:
                ray.kill(actor)
        return kept
