"""`curate plan`: hours, bytes, memory, requests and cost of every stage, before anything runs.

Steps of a stage come one after the other. Each takes the longest of what its cores compute (with
the requests they wait for), what its GPUs compute, and what the network carries.
"""

import math
import os
from dataclasses import dataclass, replace

from curation.planning.composition import Sizes
from curation.planning.constants import Constants, Gpu
from curation.planning.job import Job, Step
from curation.planning.stages import stage_steps
from curation.recipe import Recipe, RecipeError
from curation.stages.embed_worker import GPU_DECODE_THREADS

HOUR = 3600
ONE_NODE = ("driver", "node")


@dataclass(frozen=True)
class Hardware:
    """Nodes, and what each has; `gpu` tells what its GPUs do."""

    nodes: int
    cores: int
    gpus: int
    gpu: Gpu | None

    @property
    def all_cores(self) -> int:
        return self.nodes * self.cores

    @property
    def all_gpus(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Timed:
    """A step with its seconds, and what it waits for."""

    step: Step
    seconds: float
    limit: str


@dataclass(frozen=True)
class StagePlan:
    """A stage's steps; `gpus` are held all the time, though only `embed` computes on them."""

    name: str
    steps: tuple[Timed, ...]
    driver_bytes: float
    worker_bytes: float

    @property
    def seconds(self) -> float:
        return sum(timed.seconds for timed in self.steps)

    @property
    def read(self) -> float:
        return sum(timed.step.read for timed in self.steps)

    @property
    def written(self) -> float:
        return sum(timed.step.written for timed in self.steps)

    @property
    def gets(self) -> float:
        return sum(timed.step.gets for timed in self.steps)

    @property
    def puts(self) -> float:
        return sum(timed.step.puts for timed in self.steps)

    @property
    def slowest(self) -> Timed:
        return max(self.steps, key=lambda timed: timed.seconds)


def hardware(
    c: Constants, nodes: int, cores: int | None, gpus: int, gpu: str | None, precision: str
) -> Hardware:
    """Checked. Raises RecipeError that names the option."""
    for option, value, least in (("--nodes", nodes, 1), ("--gpus", gpus, 0), ("--cores", cores, 1)):
        if value is not None and value < least:
            raise RecipeError(f"{option} {value}: must be at least {least}")
    if (gpu is None) != (gpus == 0):
        missing = "--gpu NAME" if gpu is None else "--gpus NUMBER"
        raise RecipeError(f"--gpus and --gpu belong together; {missing} is missing")
    kind = c.gpu(gpu) if gpu else None
    if kind is None:
        return Hardware(nodes, cores or os.cpu_count() or 1, 0, None)
    if precision not in kind.tflops:
        has = ", ".join(kind.tflops)
        raise RecipeError(
            f"encoder.precision: {kind.name} has no {precision} (it has {has});"
            f" try --set encoder.precision={'fp16' if 'fp16' in kind.tflops else 'fp32'}"
        )
    return Hardware(nodes, cores or max(1, kind.cores * gpus // kind.gpus), gpus, kind)


def plan(recipe: Recipe, sizes: Sizes, c: Constants, on: Hardware) -> list[StagePlan]:
    """Every stage in order. Raises RecipeError or EncoderError."""
    if sizes.pool < 1:
        raise RecipeError(f"--images {sizes.pool}: must be at least 1")
    job = Job.of(recipe, sizes, c)
    return [_stage(job, on, name, steps) for name, steps in stage_steps(job).items()]


def _stage(job: Job, on: Hardware, name: str, steps: list[Step]) -> StagePlan:
    process = job.c["process_bytes"]
    driver = max((step.memory for step in steps if step.where in ONE_NODE), default=0.0)
    worker = max((step.memory for step in steps if step.where not in ONE_NODE), default=0.0)
    timed = tuple(_timed(job, on, step) for step in steps)
    return StagePlan(name, timed, process + driver, process + worker)


def _timed(job: Job, on: Hardware, step: Step) -> Timed:
    """The step's seconds on these nodes, and what they are spent on."""
    c, flop_seconds = job.c, 0.0
    if not job.remote:
        step = replace(step, gets=0.0, puts=0.0)
    computing, precision = step.seconds, job.recipe.encoder.precision
    if on.gpu and step.where == "gpus":
        rate = _rate(job, 1e12 * on.gpu.tflops[precision], 1e12 * on.gpu.tflops["fp32"])
        flop_seconds = _spread(step.flop / rate, step.items, on.all_gpus)
    else:
        semantic, copy = c[f"forward_{precision}_gflops"], c["descriptor_gflops"]
        computing += step.flop / _rate(job, 1e9 * semantic, 1e9 * copy)
    workers = {"driver": 1, "node": on.cores}.get(step.where, on.all_cores)
    if on.gpu and step.where == "gpus":
        workers = min(workers, on.all_gpus * GPU_DECODE_THREADS)
    requests = step.gets + step.puts
    waiting = requests * max(c["s3_request_s"] / step.together, c["s3_core_s"])
    on_cores = _spread(computing + waiting, step.items, workers)
    network = on.gpu.network_bytes_per_s if on.gpu else c["network_bytes_per_s"]
    nodes = 1 if step.where in ONE_NODE else on.nodes
    moving = (step.read + step.written) / (nodes * network) if job.remote else 0.0
    cores = "one process" if step.where == "driver" else "cores"
    by = {
        "S3 requests" if waiting > computing else cores: on_cores,
        "GPUs": flop_seconds,
        "network": moving,
        "S3 itself": requests / c["s3_requests_per_s"],
    }
    limit = max(by, key=lambda name: by[name])
    return Timed(step, by[limit], limit)


def _rate(job: Job, semantic: float, copy: float) -> float:
    """FLOP/s over both models, by those of each; the copy descriptor is always in fp32."""
    share = job.semantic.flop / (job.semantic.flop + job.copy.flop)
    return 1 / (share / semantic + (1 - share) / copy)


def _spread(seconds: float, items: int, workers: int) -> float:
    """Wall seconds of equal items on some workers."""
    return seconds / items * math.ceil(items / max(1, workers)) if items else 0.0


def print_plan(stages: list[StagePlan], sizes: Sizes, c: Constants, on: Hardware) -> None:
    """The table of stages, and which of them is the bottleneck."""
    what = f"{on.nodes} x {on.cores} cores" + (
        f", {on.nodes} x {on.gpus} {on.gpu.name.upper()}" if on.gpu else ""
    )
    print(f"\n{sizes.pool:,} pool images on {what}\n")
    head = "stage         hours GPU-hours   read, TB  written, TB  S3 requests  driver, GB"
    print(f"{head}  worker, GB  cost, $  limited by")
    total = StagePlan("total", tuple(t for s in stages for t in s.steps), 0, 0)
    for stage in stages:
        slow = stage.slowest
        memory = f"{stage.driver_bytes / 1e9:>10.1f}  {stage.worker_bytes / 1e9:>10.1f}"
        print(f"{_figures(stage, c, on, memory)}  {slow.limit}: {slow.step.name}")
    print(_figures(total, c, on, " " * 22))
    worst = max(stages, key=lambda stage: stage.seconds)
    slow = worst.slowest
    share = worst.seconds / total.seconds
    print(
        f"\nThe bottleneck is {worst.name}, {share:.0%} of the time: most of it goes to"
        f" '{slow.step.name}' ({_time(slow.seconds)}), limited by {slow.limit}."
    )
    _warn_of_memory(stages, on)


def _figures(stage: StagePlan, c: Constants, on: Hardware, memory: str) -> str:
    hours, requests = stage.seconds / HOUR, stage.gets + stage.puts
    return (
        f"{stage.name:<9}{hours:>10.2f}{hours * on.all_gpus:>10,.0f}{stage.read / 1e12:>11.2f}"
        f"{stage.written / 1e12:>13.2f}{requests:>13,.0f}  {memory}{cost(stage, c, on):>9,.0f}"
    )


def cost(stage: StagePlan, c: Constants, on: Hardware) -> float:
    """US dollars: all nodes for its hours, and its requests."""
    node_hour = on.gpu.node_hour_usd * on.gpus / on.gpu.gpus if on.gpu else 0.0
    node_hour = node_hour or on.cores * c["core_hour_usd"]
    asked = stage.gets * c["get_usd"] + stage.puts * c["put_usd"]
    return stage.seconds / HOUR * on.nodes * node_hour + asked


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / HOUR:.1f} h"


def _warn_of_memory(stages: list[StagePlan], on: Hardware) -> None:
    if on.gpu is None:
        return
    for stage in stages:
        workers = on.gpus if stage.name == "embed" else on.cores
        needed = stage.driver_bytes + workers * stage.worker_bytes
        have = on.gpu.node_bytes * on.gpus / on.gpu.gpus
        if needed > have:
            print(
                f"{stage.name}: {workers} workers and the driver on one node hold up to"
                f" {needed / 1e9:,.0f} GB, it has {have / 1e9:,.0f}; set resources.workers"
            )


def print_sources(c: Constants) -> None:
    """Every constant with where it comes from."""
    print()
    for name, value in c.values.items():
        print(f"{name:<20}{value:>12.4g}  {c.sources[name]}")
    for gpu in c.gpus.values():
        rates = ", ".join(f"{precision} {rate:g}" for precision, rate in gpu.tflops.items())
        print(f"{gpu.name:<20}{rates} TFLOP/s; {gpu.source}")
