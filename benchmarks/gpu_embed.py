"""Embedding on a GPU: images a second and the share of its peak, decoding beside it, and in all.

    python -m benchmarks.gpu_embed --images ../shared/bench/pool [--only models decoding whole]

Models have random weights. Their images are uint8 in the machine's memory, and their vectors end
there: pinned copies, normalisation and the copy back are counted, one batch ahead of the other as
in `embed`. FLOP of a multiplication and an addition are two. MFU is of the datasheet's peak.
"""

import argparse
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional

from benchmarks.embed import LIMITS, pack, recipe_of, same
from benchmarks.gpu_search import device_seconds, matmul
from benchmarks.measuring import machine, say, table, target, timed
from curation import pipeline
from curation.algorithms import gpu
from curation.images.decode import decode
from curation.images.effort import semantic_effort
from curation.images.encoders import (
    DEMO_MODEL,
    DTYPES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    InputFormat,
    VectorModel,
    load_semantic,
)
from curation.runtime.events import Events
from curation.runtime.executor import InProcessExecutor
from curation.runtime.store import open_store
from curation.stages.embed_worker import GPU_DECODE_THREADS, EmbedWorker
from curation.stages.tables import read_parts

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "V100": 125e12}  # dense fp16 and bf16
LEAST_MFU = 0.60
BATCH = 256
BATCHES = 12
IMAGES, PART = 4096, 1024  # of a run with one worker, and of its parts
FORM = InputFormat(224, 256, IMAGENET_MEAN, IMAGENET_STD)
BASE, LARGE, HUGE = "vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"


@dataclass(frozen=True)
class Kind:
    model: str
    precision: str
    compiled: bool = False


KINDS = (
    Kind(LARGE, "bf16"),
    Kind(LARGE, "bf16", compiled=True),
    Kind(BASE, "bf16"),
    Kind(BASE, "bf16", compiled=True),
    Kind(HUGE, "bf16"),
    Kind(HUGE, "bf16", compiled=True),
    Kind(LARGE, "fp16"),
    Kind(BASE, "fp16"),
    Kind(HUGE, "fp16"),
    Kind(LARGE, "fp16", compiled=True),
    Kind(BASE, "fp16", compiled=True),
    Kind(HUGE, "fp16", compiled=True),
)


def ahead(started: Iterable[Callable[[], Any]]) -> None:
    """Waits for each when the next has begun."""
    waiting: deque[Callable[[], Any]] = deque()
    for one in started:
        waiting.append(one)
        if len(waiting) > 1:
            waiting.popleft()()
    for one in waiting:
        one()


def measure(kind: Kind, batch: int) -> tuple[float, float, float]:
    """Seconds to make it ready, images a second from memory to memory, and of the network alone."""
    net = timm.create_model(kind.model, num_classes=0)
    full = batch if kind.compiled else None
    model = VectorModel(kind.model, net, FORM, kind.precision, full)
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, 224, 224), np.uint8)
    ready = timed(model, pixels)[0]
    model(pixels)
    whole = timed(ahead, (model.start(pixels) for _ in range(BATCHES)))[0]
    here = torch.randn(batch, 3, 224, 224, device=model.device).to(DTYPES[kind.precision])
    with torch.inference_mode():
        model.net(here)
        alone = device_seconds(lambda: [model.net(here) for _ in range(BATCHES)])
    return ready, batch * BATCHES / whole, batch * BATCHES / alone


def models(seconds: float) -> int:
    """Prints every kind that there is time for; returns 1 if none reaches the MFU."""
    name, began = torch.cuda.get_device_name(), time.perf_counter()
    peak = next((flop for part, flop in PEAK.items() if part in name), float("nan"))
    plain = {precision: matmul(DTYPES[precision]) for precision in ("bf16", "fp16")}
    rates = ", ".join(f"{precision} {rate / 1e12:.0f}" for precision, rate in plain.items())
    print(f"A plain matmul of 8192 x 8192, TFLOP/s: {rates}.\n")
    lines, best = [], 0.0
    for kind in KINDS:
        if time.perf_counter() - began > seconds - 20 * kind.compiled:
            say(f"left out, for time: {kind}")
            continue
        flop = semantic_effort(kind.model).flop
        ready, whole, alone = measure(kind, BATCH)
        torch.cuda.empty_cache()
        best = max(best, whole * flop / peak)
        shares = f"{whole * flop / peak:.1%}", f"{whole * flop / plain[kind.precision]:.1%}"
        how = "compiled" if kind.compiled else "as it is"
        lines.append([kind.model, kind.precision, how, f"{ready:.0f}", f"{whole:,.0f}"])
        lines[-1] += [f"{alone:,.0f}", f"{whole * flop / 1e12:.0f}", *shares]
        say(" | ".join(lines[-1]))
    head = ["model", "precision", "", "ready, s", "images/s", "network alone", "TFLOP/s"]
    table([*head, "MFU", "of a plain matmul"], lines)
    return target(f"MFU {best:.1%}, of {LEAST_MFU:.0%}", best >= LEAST_MFU)


def by_nvjpeg(files: list[torch.Tensor], model: VectorModel) -> Any:
    """Inputs (n, 3, S, S) of JPEGs, decoded, resized and cropped on the GPU."""
    short, size = model.form.short_side, model.form.size
    found = []
    for pixels in decode_jpeg(files, mode=ImageReadMode.RGB, device=str(model.device)):
        resized = functional.resize(pixels, [short], functional.InterpolationMode.BICUBIC)
        found.append(functional.center_crop(resized, [size]))
    return torch.stack(found)


def decoding(images: list[Path]) -> int:
    """Prints how fast images are decoded and prepared, and what nvJPEG changes in features."""
    model = load_semantic(DEMO_MODEL, None, "fp32")
    data = [path.read_bytes() for path in images if path.suffix == ".jpg"]

    def prepare(one: bytes) -> Any:
        return model.prepare(decode(one, LIMITS).pixels)

    prepare(data[0])
    lines = []
    for threads in (1, 4, 8, 16):
        some = data[: 64 * threads]
        with ThreadPoolExecutor(threads) as pool:
            seconds, _ = timed(lambda some=some, pool=pool: list(pool.map(prepare, some)))
        lines.append([f"PIL, {threads} threads", f"{len(some) / seconds:,.0f}"])
    files = [torch.frombuffer(bytearray(one), dtype=torch.uint8) for one in data]
    by_nvjpeg(files[:8], model)
    seconds = device_seconds(lambda: by_nvjpeg(files, model))
    lines.append(["nvJPEG, resized on the GPU", f"{len(files) / seconds:,.0f}"])
    table(["decoding and preparing", "images/s"], lines)
    exact = model(np.stack([prepare(one) for one in data]))
    found = model(by_nvjpeg(files, model).cpu().numpy())
    cosine = (exact * found).sum(axis=1)
    stays = same(exact, found)
    print(f"Features of {len(data)} images by nvJPEG and exactly: mean cosine {cosine.mean():.5f},")
    print(f"lowest {cosine.min():.4f}; {stays[0]} of first neighbours stay, {stays[1]} of four.\n")
    return 0


def whole(images: list[Path]) -> int:
    """Prints images a second of `embed`'s worker from tars to vectors."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        (folder / "one").mkdir()
        (folder / "one" / images[0].name).write_bytes(images[0].read_bytes())
        for number, path in enumerate(islice(cycle(images), IMAGES)):
            (folder / "images" / f"{number:06d}{path.suffix}").symlink_to(path.resolve())
        pack(sorted((folder / "images").iterdir()), folder / "tars", PART)
        weights = folder / "vit.safetensors"
        save_file(timm.create_model(BASE, num_classes=0).state_dict(), weights)
        recipe = recipe_of(folder, BASE, weights, "run", "bf16")
        encoder = recipe.encoder.model_copy(update={"batch": BATCH})
        resources = recipe.resources.model_copy(update={"part_images": PART})
        recipe = recipe.model_copy(update={"encoder": encoder, "resources": resources})
        store = open_store(recipe.output)
        pipeline.run(recipe, store, lambda _: InProcessExecutor(), Events(store), "ingest")
        worker, parts = EmbedWorker(pipeline.embed_config(recipe), recipe.output), read_parts(store)
        parts = [part for part in parts if part.rows == PART]
        worker(parts[0])
        seconds, _ = timed(lambda: [worker(part) for part in parts[1:]])
    rate = PART * (len(parts) - 1) / seconds
    what = f"{BASE} in bf16 and the built-in copy descriptor, {GPU_DECODE_THREADS} threads decode"
    print(f"One worker from tars to vectors, {what}: {rate:,.0f} images/s.\n")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The number of targets missed."""
    parser = argparse.ArgumentParser(description="Embedding on a GPU.")
    parser.add_argument("--images", type=Path, required=True, help="a folder with JPEGs")
    parser.add_argument("--seconds", type=float, default=600, help="for the models, about")
    parts = ["models", "decoding", "whole"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    options = parser.parse_args(arguments)
    if gpu.device() is None:
        print("there is no GPU: nothing is measured")
        return 0
    print(f"{torch.cuda.get_device_name()}; {machine()}\n", flush=True)
    images = sorted(path for path in options.images.iterdir() if path.suffix == ".jpg")
    missed = 0
    if "whole" in options.only:
        missed += whole(images)
    if "decoding" in options.only:
        missed += decoding(images)
    if "models" in options.only:
        missed += models(options.seconds)
    return missed


if __name__ == "__main__":
    sys.exit(main())
