"""Where a stage stands, from its files alone: what `curate status` and the service say."""

import json
import time
from collections.abc import Mapping
from typing import Any

from curation.runtime.events import HEARTBEAT_S
from curation.runtime.manifest import StageReport, read_report
from curation.runtime.store import Store

STALLED_S = 6 * HEARTBEAT_S  # a store may be slow to take one


def stage_status(store: Store, stage: str) -> dict[str, Any]:
    """The state of a stage: waiting, running, stalled, stopped, failed or done."""
    if (report := read_report(store, stage)) is not None:
        return done_status(report, read_report(store, "ingest"))
    path = f"status/{stage}.json"
    if not store.exists(path):
        return {"state": "waiting"}
    return watched(json.loads(store.read(path)))


def stage_images(stage: str, counts: Mapping[str, Any], found: int) -> int:
    """The images that a finished stage worked on, of those that were found."""
    if stage == "dedup":
        return sum(int(counts[name]) for name in ("kept", "duplicate", "near_holdout"))
    if stage in ("lineage", "report"):
        return found
    return int(counts["selected" if stage == "retrieve" else "images"])


def done_status(report: StageReport, ingest: StageReport | None) -> dict[str, Any]:
    """The status of a finished stage."""
    found = 0 if ingest is None else int(ingest.counts["images"])
    images = stage_images(report.stage, report.counts, found)
    failed = len(report.counts.get("failed_parts", {}))
    done = {"done": images, "total": images, "failed_parts": failed}
    return {"state": "done", "seconds": report.seconds, **done}


def watched(status: dict[str, Any]) -> dict[str, Any]:
    """A status that a stage wrote, as `stalled` if it runs but its heartbeat is old."""
    silent = time.time() - status["heartbeat"]
    if status["state"] == "running" and silent > STALLED_S:
        message = f"no sign of life for {round(silent)} s; run again"
        return {**status, "state": "stalled", "message": message}
    return status
