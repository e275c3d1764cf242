"""One training step of DINOv2: seconds, memory, and the share of the processor's products.

    python -m benchmarks.pretrain_step [--rounds 3] [--steps 4] [--threads 2]

ViT-S/14, 4 images, 2 x 224 and 8 x 98 pixels, two heads of 131,072 prototypes, Sinkhorn-Knopp, no
drop path: forward, backward, clipping, AdamW, average. Ours and the plain step of plain_step.py run
in turn, each round in a process of its own, whose peak is its memory. FLOP counts products only.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from benchmarks.measuring import machine, peak, say, table, target

PROTOTYPES = 131_072
IMAGES = 4
LARGEST_SHARE = 0.65  # of the plain step's seconds and bytes
LARGEST_IN_BF16 = 0.35  # of its seconds
KINDS = ("plain fp32", "ours fp32", "ours bf16")


def measure(kind: str, steps: int, threads: int) -> dict[str, float]:
    """Runs in a process of its own: medians of the steps after the first."""
    import torch

    from benchmarks.plain_step import PlainStep
    from pretrain.heads import HeadConfig
    from pretrain.masking import draw_masks
    from pretrain.param_groups import adamw, param_groups, set_rates
    from pretrain.precision import keep_freed_memory
    from pretrain.student_teacher import Batch, ObjectiveConfig, StudentTeacher, clip_gradients
    from pretrain.vit import ViTConfig

    torch.set_num_threads(threads)
    if kind.startswith("ours"):
        keep_freed_memory()
    torch.manual_seed(0)
    head = HeadConfig(prototypes=PROTOTYPES)
    model = StudentTeacher(ViTConfig(image_size=224), ObjectiveConfig(head, head)).train()
    masks = draw_masks(2 * IMAGES, 16, np.random.default_rng(0))
    crops = torch.randn(2 * IMAGES, 3, 224, 224), torch.randn(8 * IMAGES, 3, 98, 98)
    batch = Batch(*crops, masks)
    groups = param_groups(model.student, 1.0, 0.2)
    plain = PlainStep(model) if kind.startswith("plain") else None
    optimizer = torch.optim.AdamW(groups, foreach=True) if plain else adamw(groups, (0.9, 0.999))
    set_rates(optimizer.param_groups, 1e-4, 1e-4, 0.04)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind.endswith("bf16")):
            loss = plain.loss(batch, 0.04) if plain else model(batch, 0.04).total
        loss.backward()
        clip_gradients(model.student, 3.0)
        optimizer.step()
        (plain or model).update_teacher(0.994)

    flop = counted_flop(step)
    seconds, busy = [], []
    for _ in range(steps):
        began, cpu = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - began)
        busy.append(time.process_time() - cpu)
    return {
        "seconds": median(seconds),
        "cpu": median(busy),
        "bytes": float(peak()),
        "flop": flop,
        "matmul": matmul_flops(),
    }


def counted_flop(step: Callable[[], None]) -> float:
    """FLOP of the products of one step, which also warms up; attention's own are not counted."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def linear_flop(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
        flop: int = 2 * math.prod(rows) * weight[0]
        return flop

    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    counted = {onednn: linear_flop} if onednn else {}

    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        step()
    return float(counter.get_total_flops())


def matmul_flops(side: int = 2048) -> float:
    """FLOP/s of a plain fp32 product: the best of ten."""
    import torch

    one, other, best = torch.randn(side, side), torch.randn(side, side), float("inf")
    for _ in range(10):
        began = time.perf_counter()
        torch.mm(one, other)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def main(arguments: list[str] | None = None) -> int:
    """The number of targets missed."""
    parser = argparse.ArgumentParser(description="One training step of DINOv2.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS)
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(measure(options.child, options.steps, options.threads)))
        return 0
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in options.kinds or usual()}
    for _ in range(options.rounds):
        for kind, runs in found.items():
            numbers = ["--steps", str(options.steps), "--threads", str(options.threads)]
            command = [sys.executable, "-m", "benchmarks.pretrain_step", "--child", kind, *numbers]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            say(f"{kind}: {runs[-1]['seconds']:.2f} s")
    return report({kind: middle(runs) for kind, runs in found.items()})


def usual() -> tuple[str, ...]:
    """All kinds, but bf16 only where the processor has it: emulated, a step takes minutes."""
    import torch

    capable = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return KINDS if capable else KINDS[:2]


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each quantity."""
    return {name: median(run[name] for run in runs) for name in runs[0]}


def report(found: dict[str, dict[str, float]]) -> int:
    """Prints the table; returns the number of targets missed."""
    print(f"{machine()}\n")
    table(
        ["step", "s", "CPU-s", "peak, MiB", "TFLOP", "share of a plain fp32 product's FLOP/s"],
        [
            [
                kind,
                f"{run['seconds']:.2f}",
                f"{run['cpu']:.2f}",
                f"{run['bytes'] / 2**20:.0f}",
                f"{run['flop'] / 1e12:.2f}",
                f"{run['flop'] / run['seconds'] / run['matmul']:.2f}",
            ]
            for kind, run in found.items()
        ],
    )
    if not {"plain fp32", "ours fp32"} <= found.keys():
        return 0
    plain, ours = found["plain fp32"], found["ours fp32"]
    missed = 0
    for name in ("seconds", "bytes"):
        share = ours[name] / plain[name]
        missed += target(f"{share:.2f} of the plain step's {name}", share <= LARGEST_SHARE)
    if half := found.get("ours bf16"):
        share = half["seconds"] / plain["seconds"]
        missed += target(f"bf16: {share:.2f} of the plain step's time", share <= LARGEST_IN_BF16)
    return missed


if __name__ == "__main__":
    sys.exit(main())
