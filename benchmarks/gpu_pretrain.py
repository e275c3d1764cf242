"""Training steps of DINOv2 on a GPU: images/s, memory, and the share of its peak (MFU).

    python -m benchmarks.gpu_pretrain [--kinds "L bf16" "L bf16 compiled"] [--profile]

The shipped configs of ViT-S, B, L and g/14: 2 x 224 and 8 x 98 pixels, two heads of 131,072
prototypes, Sinkhorn-Knopp, stochastic depth; in bf16, in fp16 with loss scaling, and with
`parallel.compile`. A step: masks, forward of teacher and student, losses, backward, clipping,
AdamW, average, and the two looks at whether all is finite that training takes. Crops lie on the
GPU; an image is its ten crops. Activations are kept, and the batch is halved until they fit.

FLOP are those of `step_flop`. MFU is their share of 989 TFLOP/s, an H100's or H200's in bf16 and
fp16; beside it the share of what a product of 8,192 x 8,192 matrices in bf16 gets in this run.
First come the recorded steps of tests/pretrain/golden: their losses, in each precision.
"""

import argparse
import gc
import importlib
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from benchmarks.measuring import target
from benchmarks.step_flop import Size, step_flop
from pretrain.heads import HeadConfig
from pretrain.masking import draw_masks
from pretrain.param_groups import adamw, param_groups, set_rates
from pretrain.precision import Precision, this_device
from pretrain.student_teacher import Batch, ObjectiveConfig, StudentTeacher, clip_gradients
from pretrain.vit import ViT, ViTConfig, compile_blocks

PEAK_FLOPS = 989e12  # H100 and H200 SXM: dense bf16 and fp16
LEAST_MFU = 0.45  # of ViT-L, the best way
SIDE = 8192  # of the plain product
OBJECTIVE = ObjectiveConfig(HeadConfig(bottleneck=384), HeadConfig())  # the configs' default
LARGEST_BATCH = {"L": 128, "g": 32, "B": 128, "S": 128}  # images; near what 80 GB hold
KINDS = (
    *("L bf16", "L bf16 compiled", "L fp16", "g bf16", "g bf16 compiled", "B bf16", "S bf16"),
    *("B bf16 compiled", "S bf16 compiled", "L fp16 compiled", "g fp16", "B fp16", "S fp16"),
    *("g fp16 compiled", "B fp16 compiled", "S fp16 compiled"),
)
SECONDS = {False: 12, True: 45}  # what a kind takes; compiled
WARM_UP = 2  # steps
KERNELS = 45  # of a profile, the longest
MOST_FALLS = 10  # of the loss scale, from 65,536 to where no gradient overflows
TESTS = Path(__file__).parents[1] / "tests" / "pretrain"
LARGEST_ERRORS = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}  # of a recorded step's losses
COLUMNS = (
    *("step", "images", "first, s", "ms", "images/s", "peak, GiB", "TFLOP", "TFLOP/s", "MFU"),
    "of a plain product",
)


class Measured(NamedTuple):
    """Steps of one kind."""

    first: float  # seconds of the first one, which compiles
    seconds: float  # mean of the timed ones
    bytes: int  # peak of the device's memory
    flop: float
    kernels: str = ""


def shipped(name: str) -> ViTConfig:
    """The model of a shipped config; not by pretrain.config, which imports all that crops need."""
    text = resources.files("pretrain").joinpath(f"configs/vit{name.lower()}14.yaml").read_text()
    return ViTConfig(**yaml.safe_load(text)["model"])


class Steps:
    """A model with its optimizer, and crops that lie on the device; a call is a step."""

    def __init__(
        self, vit: ViTConfig, objective: ObjectiveConfig, size: Size, precision: Precision
    ) -> None:
        self.size, self.precision, self.masked = size, precision, 0
        torch.manual_seed(0)
        with precision.device:
            self.model = StudentTeacher(vit, objective).train()
            whole, local = size.global_size, size.local_size
            self.crops = (
                torch.randn(2 * size.images, 3, whole, whole),
                torch.randn(size.local_crops * size.images, 3, local, local),
            )
        self.optimizer = adamw(param_groups(self.model.student, 1.0, 0.2), (0.9, 0.999))
        set_rates(self.optimizer.param_groups, 1e-5, 1e-5, 0.04)
        self.scaler = precision.scaler()
        self.rng, self.grid = np.random.default_rng(0), size.global_size // vit.patch_size

    def compile(self) -> None:
        for network in (self.model.student, self.model.teacher):
            backbone = network["backbone"]
            assert isinstance(backbone, ViT)
            compile_blocks(backbone)

    def __call__(self) -> bool:
        """Whether losses and gradients were finite, as fp16's are not at first."""
        masks = draw_masks(2 * self.size.images, self.grid, self.rng)
        self.masked += len(masks.indices)
        with self.precision.autocast():
            losses = self.model(on(Batch(*self.crops, masks), self.precision.device), 0.04)
            self.scaler.scale(losses.total).backward()
        finite = bool(torch.isfinite(losses.total.detach()))
        self.scaler.unscale_(self.optimizer)
        norms = torch.stack(list(clip_gradients(self.model.student, 3.0).values()))
        if finite := bool(torch.isfinite(norms).all()) and finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.model.update_teacher(0.994)
        return finite


def on(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device."""
    masks = batch.masks
    tokens, indices, weights = (part.to(device, non_blocking=True) for part in masks[:3])
    return Batch(
        batch.global_crops.to(device),
        batch.local_crops.to(device),
        masks._replace(tokens=tokens, indices=indices, weights=weights),
    )


def measure(
    vit: ViTConfig, size: Size, precision: Precision, compiled: bool, steps: int, profile: bool
) -> Measured:
    """The mean of so many steps, after some to warm up. Errors: torch.OutOfMemoryError."""
    device = precision.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = Steps(vit, OBJECTIVE, size, precision)
    if compiled:
        step.compile()
    first, _ = _seconds(step, 1, device)
    _seconds(step, WARM_UP - 1, device)
    for _ in range(MOST_FALLS):
        if not step.scaler.is_enabled() or step():
            break
    step.masked = 0
    seconds, finite = _seconds(step, steps, device)
    if not finite:
        print("  not all of these steps were finite:", flush=True)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    flop = step_flop(vit, OBJECTIVE, size._replace(masked=step.masked // steps))
    return Measured(first, seconds, peak, flop, _kernels(step, device) if profile else "")


def _seconds(step: Steps, count: int, device: torch.device) -> tuple[float, bool]:
    """The mean of so many steps; whether all were finite."""
    _wait(device)
    began = time.perf_counter()
    finite = [step() for _ in range(count)]
    _wait(device)
    return (time.perf_counter() - began) / max(count, 1), all(finite)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _kernels(step: Steps, device: torch.device) -> str:
    """What a step runs on the device, the longest first."""
    kind = torch.profiler.ProfilerActivity
    activity = kind.CUDA if device.type == "cuda" else kind.CPU
    try:
        with torch.profiler.profile(activities=[activity]) as profiler:
            step()
            _wait(device)
        spent = {row.key: (_microseconds(row), row.count) for row in profiler.key_averages()}
    except Exception as error:  # a machine may forbid it; what was timed is worth more
        return f"no profile: {error}"
    longest = sorted(spent.items(), key=lambda one: -one[1][0])[:KERNELS]
    return "\n".join(f"{us:9.0f} us {n:5} x {name[:110]}" for name, (us, n) in longest)


def _microseconds(row: Any) -> float:
    return float(row.self_device_time_total or row.self_cpu_time_total)


def largest_batch(
    images: int, vit: ViTConfig, precision: Precision, compiled: bool, steps: int, profile: bool
) -> tuple[int, Measured]:
    """(images, what was measured) with so many images, or with half of them until they fit."""
    while True:
        try:
            return images, measure(vit, Size(images, 0), precision, compiled, steps, profile)
        except torch.OutOfMemoryError:
            if images == 1:
                raise
        print(f"  {images} images do not fit:", flush=True)
        _forget()
        images //= 2


def _forget() -> None:
    """Gives back what a model held, and what was compiled for it."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def product_flops(device: torch.device) -> float:
    """FLOP/s of a product in bf16: the mean of 20, after 5."""
    one, other = (torch.randn(SIDE, SIDE, device=device).bfloat16() for _ in range(2))
    for count in (5, 20):
        _wait(device)
        began = time.perf_counter()
        for _ in range(count):
            torch.mm(one, other)
        _wait(device)
    return 20 * 2 * SIDE**3 / (time.perf_counter() - began)


def recorded_losses(precision: Precision) -> float:
    """The largest relative error of a loss in the recorded steps."""
    sys.path.insert(0, str(TESTS))
    golden_check = importlib.import_module("golden_check")
    golden, worst = golden_check.Golden(TESTS / "golden" / "tiny.npz"), 0.0
    meta, device = golden.meta, precision.device
    model = golden.model(golden.interpolations()[0]).to(device)
    groups = param_groups(model.student, meta["layerwise_decay"], meta["patch_embed_lr_mult"])
    optimizer = adamw(groups, tuple(meta["betas"]))
    for number in range(meta["steps"]):
        set_rates(optimizer.param_groups, meta["lr"], meta["lr"], meta["weight_decay"])
        with precision.autocast():
            losses = model(on(golden.batch(number), device), meta["teacher_temp"])
        losses.total.backward()
        for name, value in golden.logged(losses.values).items():
            expected = meta["expected"][number]["loss"][name]
            worst = max(worst, abs(float(value) - expected) / abs(expected))
        clip_gradients(model.student, meta["clip_grad"])
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(meta["ema_momentum"])
    return worst


def check_recorded(device: torch.device) -> int:
    """Says how near each precision comes to the recorded losses; returns how many are too far."""
    missed = 0
    for name, most in LARGEST_ERRORS.items():
        error = recorded_losses(Precision(name, device))
        missed += target(f"recorded losses in {name}: off by {error:.1e} at most", error <= most)
    return missed


def row(kind: str, images: int, found: Measured, product: float) -> str:
    """Of the table under COLUMNS."""
    flops = found.flop / found.seconds
    cells = [
        *(kind, images, f"{found.first:.1f}", f"{found.seconds * 1e3:.0f}"),
        *(f"{images / found.seconds:.1f}", f"{found.bytes / 2**30:.1f}"),
        *(f"{found.flop / 1e12:.2f}", f"{flops / 1e12:.0f}"),
        *(f"{flops / PEAK_FLOPS:.1%}", f"{flops / product:.1%}"),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main(arguments: list[str] | None = None) -> int:
    """The number of targets missed."""
    parser = argparse.ArgumentParser(description="Training steps of DINOv2 on a GPU.")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=165, help="kinds beyond are left out")
    parser.add_argument("--profile", action="store_true", help="the kernels of a step of ViT-L")
    options = parser.parse_args(arguments)
    device = this_device(0)
    if device.type == "cpu":
        print("no GPU that torch sees: nothing is measured")
        return 0
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}\n", flush=True)
    return run(device, options)


def run(device: torch.device, options: argparse.Namespace) -> int:
    """Prints what is found as soon as it is; returns the number of targets missed."""
    began = time.perf_counter()
    missed, product = check_recorded(device), product_flops(device)
    print(f"\nproduct of {SIDE} x {SIDE} in bf16: {product / 1e12:.0f} TFLOP/s\n", flush=True)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    fitting, kernels, best = dict(LARGEST_BATCH), "", 0.0
    for kind in options.kinds:
        model, name, *rest = kind.split()
        if time.perf_counter() - began + SECONDS[bool(rest)] > options.seconds:
            print(f"| {kind} | left out, for time |", flush=True)
            continue
        _forget()
        how = Precision(name, device), bool(rest), options.steps, options.profile and model == "L"
        try:
            images, found = largest_batch(fitting[model], shipped(model), *how)
        except Exception as error:  # which leaves the others as they are
            print(f"| {kind} | failed: {' '.join(str(error).split())[:1000]} |", flush=True)
            missed += 1
            continue
        print(row(kind, images, found, product), flush=True)
        fitting[model] = images
        kernels += f"\n{kind}\n{found.kernels}\n" if found.kernels else ""
        if model == "L":
            best = max(best, found.flop / found.seconds / PEAK_FLOPS)
    if best:
        print()
        missed += target(f"MFU of ViT-L: {best:.1%}", best >= LEAST_MFU)
    print(kernels)
    return missed


if __name__ == "__main__":
    sys.exit(main())
