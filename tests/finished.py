"""What a run left: its files without clocks and without how often it was started."""

import json
from pathlib import Path
from typing import Any

PASSING = ("seconds", "computed", "reused", "timings")  # differ between a run and a resumed one


def counts(run: Path, stage: str) -> dict[str, Any]:
    """The counts of a finished stage."""
    found: dict[str, Any] = json.loads((run / stage / "done.json").read_text())["counts"]
    return found


def manifest_hash(run: Path) -> str:
    return str(json.loads((run / "shards" / "manifest.json").read_text())["hash"])


def final_files(run: Path) -> dict[str, Any]:
    """Every file of a finished run by its path: bytes, or JSON without the passing fields."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = path.relative_to(run).as_posix()
        if name.startswith(("events/", "status/", ".lock")) or name == "report/report.html":
            continue
        data = path.read_bytes()
        found[name] = _without(json.loads(data)) if name.endswith(".json") else data
    return found


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without(x) for name, x in value.items() if name not in PASSING}
    return [_without(x) for x in value] if isinstance(value, list) else value
