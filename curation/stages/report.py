"""All tables -> `report/report.json`: what came in, what was written, and why."""

import json
from dataclasses import dataclass
from typing import Any

from curation.runtime.events import Events
from curation.runtime.executor import Executor, timer
from curation.runtime.manifest import StageReport, begin, finish, read_report
from curation.runtime.store import Store

REPORT_JSON = "report/report.json"
REPORT_HTML = "report/report.html"


@dataclass(frozen=True)
class ReportConfig:
    """The run's name and resolved recipe, shown in the report."""

    name: str
    recipe: str
    embedding: str
    seed: int


def run(
    cfg: ReportConfig, stage_fingerprint: str, store: Store, executor: Executor, events: Events
) -> StageReport:
    """Every stage's tables and markers -> `report/report.json` and `report/report.html`."""
    elapsed = timer()
    begin(store, "report", stage_fingerprint)
    stages = {}
    for name in ("ingest", "embed", "dedup", "cluster", "retrieve", "shards", "lineage"):
        done = read_report(store, name)
        if done is not None:
            stages[name] = {"seconds": done.seconds, **done.counts}
    facts: dict[str, Any] = {"name": cfg.name, "funnel": funnel(stages), "stages": stages}
    store.write(REPORT_JSON, json.dumps(facts, indent=1).encode())
    return finish(store, StageReport("report", stage_fingerprint, {}, elapsed()))


def funnel(stages: dict[str, Any]) -> dict[str, int]:
    """The pool's way through the pipeline, and what was written."""
    pool = stages["lineage"]["decisions"]["pool"]
    total = sum(pool.values())
    usable = total - pool["rejected"]
    kept = stages["dedup"]["kept"]
    return {
        "pool images": total,
        "rejected": pool["rejected"],
        "usable": usable,
        "duplicates": stages["dedup"]["duplicate"],
        "near evaluation": stages["dedup"]["near_holdout"],
        "kept": kept,
        "retrieved": pool["selected"],
        "curated as is": stages["lineage"]["decisions"]["curated"]["selected"],
        "written": stages["shards"]["images"],
    }
