"""What Prometheus reads: gauges of every run as it stands, and the service's own requests."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from curation.runtime.store import StoreError
from curation.service import models
from curation.service.catalog import RUNS, Catalog
from curation.service.pretraining import Pretraining
from curation.service.runs import NotThere, Run

STATES = ("waiting", "running", "done", "failed", "stalled")
GAUGES = {
    "lvd_run_images": ("Input images by decision", ("run", "decision")),
    "lvd_stage_state": ("1 for the state that a stage is in", ("run", "stage", "state")),
    "lvd_stage_done": ("Images that the stage is through with", ("run", "stage")),
    "lvd_stage_total": ("Images of the stage", ("run", "stage")),
    "lvd_stage_rate_per_second": ("Images a second since it began", ("run", "stage")),
    "lvd_stage_failures": ("Images or parts that failed", ("run", "stage", "reason")),
    "lvd_stage_seconds": ("Seconds since it began, or that it took", ("run", "stage")),
    "lvd_shards": ("Shards of a finished run", ("run",)),
    "lvd_shard_bytes": ("Their bytes", ("run",)),
    "lvd_pretrain_loss": ("The latest losses", ("run", "loss")),
    "lvd_pretrain_iteration": ("Iterations done", ("run",)),
    "lvd_pretrain_images_per_second": ("Throughput of pretraining", ("run",)),
    "lvd_pretrain_data_wait_share": ("Share of time spent waiting for data", ("run",)),
    "lvd_pretrain_knn_accuracy": ("kNN accuracy of the teacher", ("run",)),
}
LATEST = {
    "images_per_s": "lvd_pretrain_images_per_second",
    "data_wait": "lvd_pretrain_data_wait_share",
    "knn_accuracy": "lvd_pretrain_knn_accuracy",
}
BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

Sample = tuple[str, tuple[str, ...], float]  # gauge, label values, value


class Requests:
    """The service's own requests; `route` is a pattern, so that labels stay few."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._total = Counter(
            "lvd_http_requests",
            "Requests",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "lvd_http_request_seconds",
            "Until the last byte",
            ("route",),
            buckets=BUCKETS,
            registry=self.registry,
        )

    def seen(self, route: str, method: str, status: int, seconds: float) -> None:
        known = method if method in ("GET", "HEAD", "POST") else "other"
        self._total.labels(route, known, str(status)).inc()
        self._seconds.labels(route).observe(seconds)


class RunGauges(Collector):
    """Reads the runs when Prometheus asks; a run that can't be read now is left out."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def collect(self) -> Iterable[Any]:
        families = {
            name: GaugeMetricFamily(name, text, labels=labels)
            for name, (text, labels) in GAUGES.items()
        }
        for samples in RUNS.map(_samples, self._catalog.all()):
            for name, labels, value in samples:
                families[name].add_metric(labels, value)
        return families.values()


def exposition(requests: Requests) -> bytes:
    """The text that Prometheus scrapes."""
    return generate_latest(requests.registry)


def _samples(run: Run | Pretraining) -> list[Sample]:
    try:
        return list(_of_run(run) if isinstance(run, Run) else _of_pretraining(run))
    except (StoreError, NotThere):
        return []


def _of_run(run: Run) -> Iterator[Sample]:
    found = run.describe()
    for decision, images in (found.decisions or {}).items():
        yield "lvd_run_images", (run.name, decision), images
    for stage in found.stages:
        yield from _of_stage(run.name, stage)
    if found.shards is not None and found.shard_bytes is not None:
        yield "lvd_shards", (run.name,), found.shards
        yield "lvd_shard_bytes", (run.name,), found.shard_bytes


def _of_stage(run: str, stage: models.Stage) -> Iterator[Sample]:
    at = (run, stage.stage)
    now = "failed" if stage.state == "stopped" else stage.state  # neither goes on by itself
    for state in STATES:
        yield "lvd_stage_state", (*at, state), float(state == now)
    if stage.state == "waiting":
        return
    yield "lvd_stage_done", at, stage.done
    yield "lvd_stage_total", at, stage.total
    if stage.rate_per_second is not None:
        yield "lvd_stage_rate_per_second", at, stage.rate_per_second
    if stage.seconds is not None:
        yield "lvd_stage_seconds", at, stage.seconds
    for reason, count in stage.failures.items():
        yield "lvd_stage_failures", (*at, reason), count


def _of_pretraining(run: Pretraining) -> Iterator[Sample]:
    curves = run.curves()
    yield "lvd_pretrain_iteration", (run.name,), curves.iteration
    latest = {loss: points[-1][1] for loss, points in curves.losses.items()}
    for loss, value in {**latest, **dict.fromkeys(curves.not_finite, math.nan)}.items():
        yield "lvd_pretrain_loss", (run.name, loss), value
    for series, name in LATEST.items():
        if series in curves.series:
            yield name, (run.name,), curves.series[series][-1][1]
