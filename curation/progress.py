"""A progress bar a stage, drawn from the statuses that stages emit."""

import sys
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm


class Bars:
    """Shows each running stage; on a terminal as a moving bar, else as a line when it ends."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._close()

    def show(self, status: dict[str, Any]) -> None:
        """Takes a status of `events.Progress`."""
        if self._bar is None or self._stage != status["stage"]:
            self._close()
            self._open(status)
        notes = {}
        if status["reused"]:
            notes["reused"] = status["reused"]
        rejected = sum(status["faults"].values())
        if rejected:
            notes["rejected"] = rejected
        if status["failed_parts"]:
            notes["failed parts"] = status["failed_parts"]
        self._bar.set_postfix(notes, refresh=False)
        self._bar.initial = status["reused"]  # parts of an earlier run don't count as speed
        self._bar.update(status["done"] - self._bar.n)
        if status["state"] != "running":
            self._close()

    def _open(self, status: dict[str, Any]) -> None:
        self._stage = status["stage"]
        self._bar = tqdm(
            total=status["total"],
            desc=f"{status['stage']:>9}",
            unit=" images",
            file=sys.stderr,
            mininterval=0.5 if sys.stderr.isatty() else 10,
            dynamic_ncols=True,
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
