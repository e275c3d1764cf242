"""What is done: fingerprints and completion markers, kept in the run itself.

A stage's folder holds `started.json` (the fingerprint its files belong to) and, once every file is
there, `done.json` (the same fingerprint and the counts). A stage whose fingerprint has changed
starts over; one that was killed goes on with the files it has.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from curation.runtime.store import Store, StoreError, delete_all


@dataclass(frozen=True)
class StageReport:
    """A finished stage: what it counted, and what a reader needs to find its tables."""

    stage: str
    fingerprint: str
    counts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def fingerprint(*parts: Any) -> str:
    """sha256 over the canonical JSON of the parts: equal exactly when nothing has changed."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def embedded_name(part: str, embedding: str) -> str:
    """The content address of embed's tables of a part: its fingerprint and that of the models."""
    return fingerprint(part, embedding)[:24]


def read_report(store: Store, stage: str) -> StageReport | None:
    """The marker of a completed stage, or None."""
    path = f"{stage}/done.json"
    if not store.exists(path):
        return None
    try:
        return StageReport(**json.loads(store.read(path)))
    except (ValueError, TypeError):
        raise StoreError(
            f"{store.locate(path)}: not a stage marker; delete it and run again"
        ) from None


def completed(store: Store, stage: str, wanted: str) -> StageReport | None:
    """The marker, if the stage is complete for exactly this fingerprint."""
    report = read_report(store, stage)
    return report if report is not None and report.fingerprint == wanted else None


def forget(store: Store, stage: str) -> None:
    """Takes back the completion of a stage; its finished parts stay."""
    store.delete(f"{stage}/done.json")
    store.delete(f"status/{stage}.json")


def restart(store: Store, stage: str) -> None:
    """Makes a stage start over, though its fingerprint is the same."""
    forget(store, stage)
    store.delete(f"{stage}/started.json")


def begin(store: Store, stage: str, wanted: str, keep: tuple[str, ...] = ()) -> None:
    """Makes the stage's folder ready: files of another fingerprint go, the marker first.

    Folders in `keep` hold content-addressed files, which stay valid whatever the recipe says.
    """
    started = f"{stage}/started.json"
    if store.exists(started) and json.loads(store.read(started))["fingerprint"] == wanted:
        return
    # Both markers go before any file: a kill in between must not leave them over half the files.
    store.delete(f"{stage}/done.json")
    store.delete(started)
    kept = tuple(f"{stage}/{name}/" for name in keep)
    found = [entry.path for entry in store.list(stage)]
    delete_all(store, [path for path in found if not path.startswith(kept)])
    store.write(started, json.dumps({"fingerprint": wanted}).encode())


def finish(store: Store, report: StageReport) -> StageReport:
    """Publishes the marker: from here on the stage is complete."""
    store.write(
        f"{report.stage}/done.json", json.dumps(asdict(report), sort_keys=True, indent=1).encode()
    )
    return report
