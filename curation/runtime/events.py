"""Progress as files: `events/*.jsonl` (what happened) and `status/<stage>.json` (where it stands).

`curate status` and the service read these and nothing else. A stage that died is recognised by
its status: it says `running`, but its heartbeat is old.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from curation.runtime.store import Store

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

    def status(self, status: dict[str, Any], durable: bool) -> None:
        """Shows a status to the listener, and keeps it in the store when `durable`."""
        if self._listen is not None:
            self._listen(status)
        if durable:
            data = json.dumps({**status, "heartbeat": time.time()}, sort_keys=True).encode()
            self.store.write(f"status/{status['stage']}.json", data)


class Progress:
    """Counts of one running stage, by images."""

    def __init__(self, events: Events, stage: str, total: int, workers: int) -> None:
        self.events, self.stage, self.total, self.workers = events, stage, total, workers
        self.done = self.reused = self.failed_parts = 0
        self.faults: Counter[str] = Counter()
        self._started = time.time()
        self._kept = 0.0
        events.emit(stage, "started", total=total, workers=workers)
        self._show(durable=True)

    def skip(self, images: int) -> None:
        """Images whose part was finished by an earlier run."""
        self.reused += images
        self.done += images
        self._show(durable=False)

    def add(self, part: str, images: int, faults: dict[str, int]) -> None:
        """A part that is now finished."""
        self.done += images
        self.faults.update(faults)
        self.events.emit(self.stage, "part", part=part, images=images, faults=faults)
        self._show(durable=time.monotonic() - self._kept > HEARTBEAT_S)

    def fail(self, part: str, images: int, error: str) -> None:
        """A part that could not be done, with the reason."""
        self.done += images
        self.failed_parts += 1
        self.events.emit(self.stage, "part_failed", part=part, images=images, error=error)
        self._show(durable=True)

    def beat(self) -> None:
        """A sign of life between parts."""
        if time.monotonic() - self._kept > HEARTBEAT_S:
            self._show(durable=True)

    def close(self, state: str, message: str = "") -> None:
        """The last status: `done`, `failed` or `stopped`."""
        self.events.emit(self.stage, state, done=self.done, message=message)
        self._show(durable=True, state=state, message=message)
        self.events.flush()

    def _show(self, durable: bool, state: str = "running", message: str = "") -> None:
        if durable:
            self._kept = time.monotonic()
        status = {
            "stage": self.stage,
            "state": state,
            "message": message,
            "total": self.total,
            "done": self.done,
            "reused": self.reused,
            "failed_parts": self.failed_parts,
            "faults": dict(self.faults),
            "workers": self.workers,
            "started": self._started,
        }
        self.events.status(status, durable)
