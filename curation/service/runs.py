"""A run of curation, read from what it wrote. Nothing is kept but caches."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import yaml

from curation.runtime.manifest import StageReport, read_report
from curation.runtime.status import done_status, watched
from curation.runtime.store import Entry, Store, read_table
from curation.schema import PARTS_TABLE, RECIPE_FILE, REPORT_JSON, VERSIONS
from curation.service import models
from curation.service.cache import Cache, Fresh
from curation.service.events import EventLog
from curation.service.intact import intact

STAGES = tuple(VERSIONS)
STATUS_S = 1.0
ENDED = ("failed", "stalled", "stopped")
READERS = ThreadPoolExecutor(16, "read-run")  # on S3 a stage's files take a moment


class NotThere(Exception):
    """What was asked for does not exist (yet): says what, and where to look."""


# The markers of the stages that are done, and the statuses of those that have begun.
State = tuple[dict[str, StageReport], dict[str, dict[str, Any]]]


class Run:
    """One run of curation. What it wrote is read again at most every `STATUS_S`."""

    kind: Literal["curation"] = "curation"

    def __init__(self, name: str, path: str, store: Store) -> None:
        self.name, self.path, self.store = name, path, store
        self.events = EventLog(store)
        self._state = Fresh(self._read_state, STATUS_S)
        self._settled: tuple[list[Entry], State] | None = None
        self._facts: Cache[Any] = Cache(3, lambda _: 1)  # of the recipe, the report and the parts

    def _read_state(self) -> State:
        """Of a finished run what was read before, unless a stage has told something since."""
        told = list(self.store.list("status"))
        if self._settled is None or self._settled[0] != told:
            state = self._read_stages()
            self._settled = (told, state) if len(state[0]) == len(STAGES) else None
            return state
        return self._settled[1]

    def _read_stages(self) -> State:
        reports, statuses = {}, {}
        for stage, found in zip(STAGES, READERS.map(self._read_stage, STAGES), strict=True):
            report, status = found
            if report is not None:
                reports[stage] = report
            if status is not None:
                statuses[stage] = status
        return reports, statuses

    def _read_stage(self, stage: str) -> tuple[StageReport | None, dict[str, Any] | None]:
        report, path = read_report(self.store, stage), f"status/{stage}.json"
        if not self.store.exists(path):
            return report, None
        with intact(self.store, path):
            return report, json.loads(self.store.read(path))

    def reports(self) -> dict[str, StageReport]:
        """The markers of the stages that are done."""
        return self._state.get()[0]

    def report(self, stage: str) -> StageReport:
        """The marker of a stage. Raises NotThere when it is not done."""
        report = self.reports().get(stage)
        if report is None:
            raise NotThere(f"run '{self.name}' has not come through {stage} yet")
        return report

    def started(self, stage: str) -> float:
        """When a stage began: what it wrote before that may be another recipe's."""
        with intact(self.store, f"status/{stage}.json"):
            return float(self._state.get()[1].get(stage, {}).get("started", 0))

    def recipe(self) -> str:
        """The resolved recipe as YAML."""
        return self.store.read(RECIPE_FILE).decode("utf-8", "replace")

    def stages(self) -> list[models.Stage]:
        """All stages in order, as they stand now."""
        with intact(self.store):
            return self._stages()

    def _stages(self) -> list[models.Stage]:
        reports, statuses = self._state.get()
        found = []
        for stage in STAGES:
            if stage in reports:
                done = _done(stage, reports[stage], reports.get("ingest"))
                heartbeat = statuses.get(stage, {}).get("heartbeat")
                found.append(done.model_copy(update={"heartbeat": heartbeat}))
            elif stage in statuses:
                found.append(_under_way(stage, watched(statuses[stage])))
            else:
                found.append(models.Stage(stage=stage, state="waiting"))
        return found

    def summary(self) -> models.RunSummary:
        with intact(self.store):
            return models.RunSummary(**self._summary(self._stages()))

    def _summary(self, stages: list[models.Stage]) -> dict[str, Any]:
        states = {stage.state for stage in stages}
        state: str = next((s for s in (*ENDED, "running") if s in states), "waiting")
        if states == {"done"}:
            state = "done"
        at = next((stage for stage in stages if stage.state == state != "done"), None)
        reports = self.reports()
        ingest, shards = reports.get("ingest"), reports.get("shards")
        return {
            "run": self.name,
            "path": self.path,
            "kind": self.kind,
            "state": state,
            "stage": None if at is None or at.state == "waiting" else at.stage,
            "share": at.done / at.total if at and at.total else None,
            "images": None if ingest is None else ingest.counts["images"],
            "selected": None if shards is None else shards.counts["images"],
            "updated": max((s.heartbeat for s in stages if s.heartbeat), default=None),
        }

    def describe(self) -> models.Run:
        """All that the run's page shows."""
        with intact(self.store):
            return self._describe(self._stages(), self.reports())

    def _describe(self, stages: list[models.Stage], reports: dict[str, StageReport]) -> models.Run:
        shards = reports["shards"].counts if "shards" in reports else {}
        facts = self._report_facts()
        rows = [models.CompositionRow(**row) for row in facts["composition"]["rows"]]
        return models.Run(
            **self._summary(stages),
            name=self._facts.get(self.store.stat(RECIPE_FILE), self._recipe_name),
            stages=stages,
            funnel=funnel(reports, self._pool_images()),
            decisions=decisions(reports),
            composition=rows,
            notices=facts["notices"],
            shards=shards.get("shards"),
            shard_bytes=shards.get("bytes"),
            manifest_hash=shards.get("hash"),
        )

    def _recipe_name(self) -> str:
        with intact(self.store, RECIPE_FILE):
            return str(yaml.safe_load(self.recipe()).get("name", self.name))

    def _report_facts(self) -> dict[str, Any]:
        report = self.reports().get("report")
        if report is None:
            return {"composition": {"rows": []}, "notices": []}

        def read() -> dict[str, Any]:
            with intact(self.store, REPORT_JSON):
                found = json.loads(self.store.read(REPORT_JSON))
                return {name: found[name] for name in ("composition", "notices")}

        facts: dict[str, Any] = self._facts.get(("report", report.fingerprint), read)
        return facts

    def _pool_images(self) -> int | None:
        """Images of the pool, from the list of parts."""
        ingest = self.reports().get("ingest")
        if ingest is None:
            return None

        def read() -> int:
            with intact(self.store, PARTS_TABLE):
                table = read_table(self.store, PARTS_TABLE, ["role", "rows"])
                pool = np.asarray(table["role"].to_numpy(zero_copy_only=False) == "pool")
                return int(table["rows"].to_numpy()[pool].sum())

        return int(self._facts.get(("pool", ingest.fingerprint), read))


def _done(stage: str, report: StageReport, ingest: StageReport | None) -> models.Stage:
    status = done_status(report, ingest)
    failures = dict(report.counts.get("faults", {}))
    if status["failed_parts"]:
        failures["part_failed"] = status["failed_parts"]
    whole = report.seconds and stage != "report" and not report.counts.get("reused")
    return models.Stage(
        stage=stage,
        state="done",
        done=status["done"],
        total=status["total"],
        seconds=report.seconds,
        rate_per_second=status["done"] / report.seconds if whole else None,
        failures=failures,
    )


def _under_way(stage: str, status: dict[str, Any]) -> models.Stage:
    """A stage that has begun: its speed without what an earlier session had done."""
    running = status["state"] == "running"
    until = time.time() if running else status["heartbeat"]
    seconds = max(until - status["started"], 0.0)
    worked = status["heartbeat"] - status["started"]
    new = status["done"] - status["reused"]
    rate = new / worked if new > 0 and worked > 0 else None
    failures = dict(status["faults"])
    if status["failed_parts"]:
        failures["part_failed"] = status["failed_parts"]
    return models.Stage(
        stage=stage,
        state=status["state"] if status["state"] != "done" else "running",  # its marker comes next
        message=status["message"],
        rate_per_second=rate,
        eta_seconds=(status["total"] - status["done"]) / rate if rate and running else None,
        seconds=seconds,
        failures=failures,
        **{n: status[n] for n in ("done", "total", "reused", "workers", "heartbeat")},
    )


def decisions(reports: dict[str, StageReport]) -> dict[str, int] | None:
    """Images by decision over all sources, once the lineage is there."""
    if "lineage" not in reports:
        return None
    total: dict[str, int] = {}
    for counts in reports["lineage"].counts["decisions"].values():
        for decision, images in counts.items():
            total[decision] = total.get(decision, 0) + images
    return total


def funnel(reports: dict[str, StageReport], pool: int | None) -> list[models.Step]:
    """The pool's way through the stages that are done."""
    if pool is None:
        return []
    steps = [models.Step(name="in the pool", images=pool)]
    if "dedup" not in reports:
        return steps
    dedup = reports["dedup"].counts
    usable = sum(dedup[name] for name in ("kept", "duplicate", "near_holdout"))
    steps.append(models.Step(name="usable", images=usable, lost={"rejected": pool - usable}))
    lost = {"duplicates": dedup["duplicate"], "near the evaluation sets": dedup["near_holdout"]}
    steps.append(models.Step(name="distinct", images=dedup["kept"], lost=lost))
    if "lineage" not in reports:
        return steps
    by_role = reports["lineage"].counts["decisions"]
    retrieved = by_role["pool"]["selected"]
    left = {"not retrieved": dedup["kept"] - retrieved}
    steps.append(models.Step(name="retrieved", images=retrieved, lost=left))
    written, as_is = reports["shards"].counts["images"], by_role["curated"]["selected"]
    return [*steps, models.Step(name="written", images=written, added=as_is)]
