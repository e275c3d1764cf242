"""A run of pretraining: its `metrics.jsonl`, followed as it grows and thinned for charts."""

import json
import math
import time
from collections.abc import Iterable
from typing import Any, Literal

import yaml

from curation.runtime.status import STALLED_S
from curation.runtime.store import Store
from curation.service import models
from curation.service.cache import Fresh
from curation.service.intact import intact

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
READ_S = 1.0
BLOCK_BYTES = 4 << 20
MAX_POINTS = 1_000
LOSSES = ("loss", "dino_global", "dino_local", "ibot", "koleo")
SERIES = ("images_per_s", "data_wait", "knn_accuracy", "feature_rank", "lr", "teacher_entropy")
SILENT_STEPS = 20  # log intervals without a line before it counts as stalled

Points = list[tuple[int, float]]


class Pretraining:
    """Keeps the thinned series and how far the file is read; both start over when it shrinks."""

    kind: Literal["pretraining"] = "pretraining"

    def __init__(self, name: str, path: str, store: Store) -> None:
        self.name, self.path, self.store = name, path, store
        self._read_bytes = 0
        self._series: dict[str, Points] = {}
        self._not_finite: set[str] = set()
        self._last: dict[str, Any] = {}
        self._state = Fresh(self._read, READ_S)
        self._iterations: int | None = None

    def _read(self) -> dict[str, Points]:
        size = self.store.stat(METRICS).size
        if size < self._read_bytes:  # a resumed run drops the lines that it does again
            self._read_bytes, self._series, self._not_finite = 0, {}, set()
        while self._read_bytes < size:
            data = self.store.read(METRICS, self._read_bytes, BLOCK_BYTES)
            whole = data[: data.rfind(b"\n") + 1]
            if not whole:
                break
            self._read_bytes += len(whole)
            self._take(whole.splitlines())
        if self._iterations is None and self.store.exists(CONFIG):
            with intact(self.store, CONFIG):
                schedule = (yaml.safe_load(self.store.read(CONFIG)) or {}).get("schedule") or {}
                given = schedule.get("iterations")
                self._iterations = None if given is None else int(given)
        return {name: list(points) for name, points in self._series.items()}

    def _take(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            try:
                told = json.loads(line)
                iteration = int(told["iteration"])
                for name in (*LOSSES, *SERIES):
                    if name in told:
                        self._add(name, iteration, told[name])
            except (ArithmeticError, LookupError, TypeError, ValueError):
                continue  # a line that a kill cut short
            self._last = told

    def _add(self, name: str, iteration: int, value: Any) -> None:
        """One point; `pretrain` writes null for what is not finite."""
        if not isinstance(value, int | float) or not math.isfinite(value):
            self._not_finite.add(name)
            return
        self._not_finite.discard(name)
        points = self._series.setdefault(name, [])
        while points and points[-1][0] >= iteration:
            points.pop()  # done again since
        points.append((iteration, float(value)))
        if len(points) > MAX_POINTS:
            self._series[name] = _thinned(points)

    def summary(self) -> models.RunSummary:
        with intact(self.store, METRICS):
            return self._summary(self._state.get())

    def _summary(self, series: dict[str, Points]) -> models.RunSummary:
        iteration = max((points[-1][0] for points in series.values()), default=0)
        updated, whole = self._last.get("time"), self._iterations
        quiet = max(STALLED_S, SILENT_STEPS * float(self._last.get("step_s") or 0))
        state = "running" if updated and time.time() - updated < quiet else "stalled"
        return models.RunSummary(
            run=self.name,
            path=self.path,
            kind="pretraining",
            state="done" if whole and iteration >= whole else state,
            share=iteration / whole if whole else None,
            updated=updated,
        )

    def curves(self) -> models.Curves:
        """Losses, throughput, data wait and kNN accuracy over iterations."""
        series = self._state.get()
        return models.Curves(
            run=self.name,
            iteration=max((points[-1][0] for points in series.values()), default=0),
            iterations=self._iterations,
            losses={name: series[name] for name in LOSSES if name in series},
            series={name: series[name] for name in SERIES if name in series},
            not_finite=[name for name in LOSSES if name in self._not_finite],
        )


def _thinned(points: Points) -> Points:
    """Half of MAX_POINTS at most, evenly over the iterations; the first and the last stay."""
    step = (points[-1][0] - points[0][0]) / (MAX_POINTS / 2)
    kept = points[:1]
    for point in points[1:-1]:
        if point[0] - kept[-1][0] >= step:
            kept.append(point)
    return [*kept, points[-1]]
