"""The events of a run, followed by place: a segment's name and how far it has been read."""

import json
import re
from typing import Any

from curation.runtime.store import Entry, Store
from curation.service.cache import Fresh

BLOCK_BYTES = 256 << 10
RECENT_BYTES = 16 << 10
LIST_S = 1.0
PLACE = re.compile(r"([0-9A-Za-z-]{1,80}\.jsonl):(\d{1,12})")


class EventLog:
    """Segments are listed once for all who follow them; each follower reads on from its place."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._segments = Fresh(self._list, LIST_S)

    def _list(self) -> list[Entry]:
        return [one for one in self._store.list("events") if one.path.endswith(".jsonl")]

    def recent(self) -> str:
        """The place some lines before the end; empty while there are no events."""
        segments = self._segments.get()
        if not segments:
            return ""
        last = segments[-1]
        start = max(0, last.size - RECENT_BYTES)
        if start:
            start += self._store.read(last.path, start, RECENT_BYTES).find(b"\n") + 1
        return f"{_name(last)}:{start}"

    def read(self, place: str) -> tuple[list[dict[str, Any]], str]:
        """The next events after a place, a block at most, and the place after them.

        A place that is none of this run's (or empty) means from the beginning of what there is.
        """
        segments = self._segments.get()
        known = PLACE.fullmatch(place)
        names = [_name(segment) for segment in segments]
        at, offset = 0, 0
        if known is not None and known[1] in names:
            at, offset = names.index(known[1]), int(known[2])
        for number in range(at, len(segments)):
            if offset < segments[number].size:
                data = self._store.read(segments[number].path, offset, BLOCK_BYTES)
                whole = data[: data.rfind(b"\n") + 1]
                if whole:
                    return _lines(whole), f"{names[number]}:{offset + len(whole)}"
            if number + 1 < len(segments):
                offset = 0
        return [], place


def _name(segment: Entry) -> str:
    return segment.path.rpartition("/")[2]


def _lines(data: bytes) -> list[dict[str, Any]]:
    found = []
    for line in data.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # a line that a kill cut short
        if isinstance(event, dict):
            found.append(event)
    return found
