"""Progress as files: `events/*.jsonl` (what happened) and `status/<stage>.json` (where it stands).

`curate status` and the service read these and nothing else. A stage that died is recognised by
its status: it says `running`, but its heartbeat is old.
"""

import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from curation.runtime.store import Store, StoreError

HEARTBEAT_S = 5.0
ROTATE_BYTES = 1 << 20


class Events:
    """The writer's side. `listen` gets every status as it is made (for progress bars)."""

    def __init__(
        self, store: Store, listen: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self.store = store
        self._listen = listen
        self._session = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}"
        self._segment, self._written = 0, 0
        self._buffer: list[bytes] = []
        self._flushed = 0.0
        self._status: dict[str, Any] = {}

    def emit(self, stage: str, event: str, **fields: Any) -> None:
        """Adds a line; lines are flushed together at most every `HEARTBEAT_S` seconds."""
        line = {"time": round(time.time(), 3), "stage": stage, "event": event, **fields}
        self._buffer.append(json.dumps(line, sort_keys=True).encode() + b"\n")
        if time.monotonic() - self._flushed > HEARTBEAT_S:
            self.flush()

    def flush(self) -> None:
        """Writes what is buffered; a new segment begins when one is full."""
        self._flushed = time.monotonic()
        if not self._buffer:
            return
        data = b"".join(self._buffer)
        self._buffer.clear()
        self.store.append(f"events/{self._session}-{self._segment:04d}.jsonl", data)
        self._written += len(data)
        if self._written > ROTATE_BYTES:
            self._segment, self._written = self._segment + 1, 0

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Keeps the stage's status fresh while the block runs, and says at last how it ended.

        The heartbeat is a thread: neither a long part nor a long step between parts looks dead.
        """
        self._status = _status(name, "running")
        self._keep("running")
        ended = threading.Event()
        heart = threading.Thread(target=self._beat, args=(ended,), daemon=True)
        heart.start()
        state, message = "done", ""
        try:
            yield
        except BaseException as error:
            state = "failed" if isinstance(error, Exception) else "stopped"
            message = " ".join(str(error).split())
            raise
        finally:
            ended.set()
            heart.join()
            self.emit(name, state, message=message)
            self._keep(state, message)
            self.flush()

    def show(self, status: dict[str, Any]) -> None:
        """Shows a status to the listener; the next heartbeat keeps it in the store."""
        self._status = status
        if self._listen is not None:
            self._listen(status)

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT_S):
            # A store that doesn't answer for a moment costs a heartbeat, not the run.
            with contextlib.suppress(StoreError):
                self._keep("running")

    def _keep(self, state: str, message: str = "") -> None:
        now = {"state": state, "message": message, "heartbeat": time.time()}
        data = json.dumps({**self._status, **now}, sort_keys=True).encode()
        self.store.write(f"status/{self._status['stage']}.json", data)


def _status(stage: str, state: str) -> dict[str, Any]:
    counts = dict.fromkeys(("total", "done", "reused", "failed_parts", "workers"), 0)
    return {"stage": stage, "state": state, **counts, "faults": {}, "started": time.time()}


class Progress:
    """Counts of the work over the parts of one stage, by images."""

    def __init__(self, events: Events, stage: str, total: int, workers: int) -> None:
        self._events, self.total = events, total
        self._status = _status(stage, "running") | {"total": total, "workers": workers}
        self.faults: Counter[str] = Counter()
        events.emit(stage, "started", total=total, workers=workers)
        self._show()

    def skip(self, images: int) -> None:
        """Images whose part was finished by an earlier run."""
        self._status["reused"] += images
        self._status["done"] += images
        self._show()

    def add(self, part: str, images: int, faults: dict[str, int]) -> None:
        """A part that is now finished."""
        self._status["done"] += images
        self.faults.update(faults)
        self._emit("part", part=part, images=images, faults=faults)
        self._show()

    def fail(self, part: str, images: int, error: str) -> None:
        """A part that could not be done, with the reason."""
        self._status["done"] += images
        self._status["failed_parts"] += 1
        self._emit("part_failed", part=part, images=images, error=error)
        self._show()

    def close(self) -> None:
        """The parts are through, or were stopped; the stage may have more to do."""
        self._show("ended")

    def _emit(self, event: str, **fields: Any) -> None:
        self._events.emit(self._status["stage"], event, **fields)

    def _show(self, state: str = "running") -> None:
        self._events.show({**self._status, "faults": dict(self.faults), "state": state})
