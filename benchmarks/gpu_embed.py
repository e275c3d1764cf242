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
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file

from benchmarks.embed import LIMITS, pack, recipe_of, same
from benchmarks.gpu_search import REPEATS, SIDE, device_seconds, matmul
from benchmarks.measuring import machine, say, table, target, timed
from curation import pipeline
from curation.algorithms import gpu
from curation.images import nvjpeg
from curation.images.decode import decode, examine
from curation.images.effort import semantic_effort
from curation.images.encoders import (
    DEMO_MODEL,
    DTYPES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    InputFormat,
    VectorModel,
    load_copy_descriptor,
    load_semantic,
)
from curation.images.nvjpeg import Jpeg
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


def make(kind: Kind, batch: int) -> VectorModel:
    """With the same random weights whatever the precision."""
    torch.compiler.reset()  # it compiles a class for some models only
    torch.manual_seed(0)
    with torch.device("cuda"):
        net = timm.create_model(kind.model, num_classes=0)
    return VectorModel(kind.model, net, FORM, kind.precision, batch if kind.compiled else None)


def measure(kind: Kind, batch: int) -> tuple[float, float, float, float]:
    """Seconds to make it ready, images a second from memory to memory, of the network alone, and
    the mean cosine of vectors with those in fp32."""
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, 224, 224), np.uint8)
    exact = make(Kind(kind.model, "fp32"), batch)(pixels)
    ready, model = timed(make, kind, batch)
    cosine = float((model(pixels) * exact).sum(axis=1).mean())
    whole = timed(ahead, (model.start(pixels) for _ in range(BATCHES)))[0]
    with torch.inference_mode():
        here = torch.as_tensor(pixels, device=model.device)
        alone = device_seconds(lambda: [model.rows(here) for _ in range(BATCHES)])
    return ready, batch * BATCHES / whole, batch * BATCHES / alone, cosine


def sustained(dtype: torch.dtype, seconds: float = 3.0) -> float:
    """FLOP/s of a plain product that has gone on for so long: a card lowers its clock when it
    reaches its power, after fractions of a second."""
    left, right = (torch.randn(SIDE, SIDE, device="cuda").to(dtype) for _ in range(2))
    ends, rate = time.perf_counter() + seconds, 0.0
    while time.perf_counter() < ends:
        rate = (
            REPEATS * 2 * SIDE**3 / device_seconds(lambda: [left @ right for _ in range(REPEATS)])
        )
    return rate


def models(seconds: float) -> int:
    """Prints every kind that there is time for; returns 1 if none reaches the MFU."""
    name, began = torch.cuda.get_device_name(), time.perf_counter()
    peak = next((flop for part, flop in PEAK.items() if part in name), float("nan"))
    print(f"A plain matmul of {SIDE} x {SIDE}, TFLOP/s: its first ones, and after three seconds:")
    plain = {}
    for precision in ("bf16", "fp16"):
        first, plain[precision] = matmul(DTYPES[precision]), sustained(DTYPES[precision])
        print(f"{precision} {first / 1e12:.0f}, {plain[precision] / 1e12:.0f}")
    print()
    lines, best = [], 0.0
    for kind in KINDS:
        if time.perf_counter() - began > seconds - 20 * kind.compiled:
            say(f"left out, for time: {kind}")
            continue
        flop = semantic_effort(kind.model).flop
        ready, whole, alone, cosine = measure(kind, BATCH)
        torch.cuda.empty_cache()
        best = max(best, whole * flop / peak)
        shares = f"{whole * flop / peak:.1%}", f"{whole * flop / plain[kind.precision]:.1%}"
        how = "compiled" if kind.compiled else "as it is"
        lines.append([kind.model, kind.precision, how, f"{ready:.0f}", f"{whole:,.0f}"])
        lines[-1] += [f"{alone:,.0f}", f"{whole * flop / 1e12:.0f}", *shares, f"{cosine:.5f}"]
        say(" | ".join(lines[-1]))
    head = ["model", "precision", "", "ready, s", "images/s", "network alone", "TFLOP/s"]
    table([*head, "MFU", "of a plain matmul for long", "cosine with fp32"], lines)
    return target(f"MFU {best:.1%}, of {LEAST_MFU:.0%}", best >= LEAST_MFU)


def plain_jpegs(images: list[Path]) -> dict[int, Jpeg]:
    """Those that nvJPEG may decode."""
    found = []
    for data in (path.read_bytes() for path in images):
        image = examine(data, LIMITS)
        if nvjpeg.eligible(image, data):
            found.append(Jpeg(data, image.width * image.height))
    return dict(enumerate(found))


def decoding(images: list[Path]) -> int:
    """Prints how fast both models' inputs are made, and what nvJPEG changes in features."""
    models = {
        "semantic": load_semantic(DEMO_MODEL, None, "fp32"),
        "copy": load_copy_descriptor(None),
    }
    forms, device = [model.form for model in models.values()], models["semantic"].device
    jpegs = plain_jpegs(images)
    files = [jpeg.data for jpeg in jpegs.values()]

    def by_pillow(data: bytes) -> list[Any]:
        pixels = decode(data, LIMITS).pixels
        return [form.prepare(pixels) for form in forms]

    def check(data: bytes) -> tuple[bytes, bool]:
        return sha256(data).digest(), nvjpeg.eligible(examine(data, LIMITS), data)

    def by_threads(work: Callable[[bytes], Any], threads: int, some: list[bytes]) -> float:
        with ThreadPoolExecutor(threads) as pool:
            return len(some) / timed(lambda: list(pool.map(work, some)))[0]

    by_pillow(files[0])
    lines = []
    for threads in (1, 4, GPU_DECODE_THREADS, 16):
        rate = by_threads(by_pillow, threads, files[: 64 * threads])
        lines.append([f"Pillow, {threads} threads", f"{rate:,.0f}"])
    rate = by_threads(check, GPU_DECODE_THREADS, files)
    lines.append([f"hashed and checked for nvJPEG, {GPU_DECODE_THREADS} threads", f"{rate:,.0f}"])
    list(nvjpeg.inputs(dict(islice(jpegs.items(), 8)), forms, device))
    seconds = device_seconds(lambda: list(nvjpeg.inputs(jpegs, forms, device)))
    lines.append(["nvJPEG, resized on the GPU", f"{len(jpegs) / seconds:,.0f}"])
    table(["inputs of both models", "images/s"], lines)
    made = list(nvjpeg.inputs(jpegs, forms, device))
    with ThreadPoolExecutor(16) as pool:
        inputs = list(pool.map(by_pillow, (files[key] for keys, _ in made for key in keys)))
    print(f"{len(inputs)} of {len(jpegs)} JPEGs were decoded by nvJPEG. Features beside Pillow's:")
    for which, (name, model) in enumerate(models.items()):
        exact = model(np.stack([one[which] for one in inputs]))
        found = np.concatenate([model(chunk[which]) for _, chunk in made])
        cosine, stays = (exact * found).sum(axis=1), same(exact, found)
        print(f"{name}: mean cosine {cosine.mean():.5f}, lowest {cosine.min():.4f};", end=" ")
        print(f"{stays[0]} of first neighbours stay, {stays[1]} of four.")
    print()
    return 0


def whole(images: list[Path]) -> int:
    """Prints images a second of `embed`'s worker from tars to vectors, by both decoders."""
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
        cfg, parts = pipeline.embed_config(recipe), read_parts(store)
        parts = [part for part in parts if part.rows == PART]
        lines = []
        for decoder in ("pillow", "nvjpeg"):
            worker = EmbedWorker(replace(cfg, decoder=decoder), recipe.output)
            worker(parts[0])
            seconds, _ = timed(lambda worker=worker: [worker(part) for part in parts[1:]])
            lines.append([decoder, f"{PART * (len(parts) - 1) / seconds:,.0f}"])
    print(f"One worker from tars to vectors, {BASE} in bf16 and the built-in copy descriptor,")
    print(f"{GPU_DECODE_THREADS} threads:\n")
    table(["decoder", "images/s"], lines)
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
