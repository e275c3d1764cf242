"""Embedding JPEGs from tars: against its own parts, a plain loop and Ray; what rounding costs.

    python -m benchmarks.embed --images ../shared/bench/pool [--count 256] [--weights FILE]

Rates are images a second of processor time of one core, all processes counted, so that other work
beside it counts little; the overhead of Ray is of wall time, in turns with plain processes.
`--weights` is of DeiT-tiny: with them features mean something, and drift is measured.
"""

import argparse
import multiprocessing
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms import v2

from benchmarks.measuring import machine, say, table, target
from curation import pipeline
from curation.algorithms.products import fast_dtype
from curation.images import encoders
from curation.images.decode import Limits, decode
from curation.images.encoders import VectorModel, load_semantic
from curation.planning.small_runs import TimedExecutor
from curation.recipe import Recipe
from curation.runtime.events import Events
from curation.runtime.executor import one_thread
from curation.runtime.store import open_store
from curation.stages.embed_worker import EmbedConfig, EmbedWorker
from curation.stages.tables import Part, read_parts

MODEL, TINY = "vit_small_patch16_224", "deit_tiny_patch16_224"
LEAST_SHARE, LEAST_TIMES, MOST_OVERHEAD = 0.85, 3.0, 0.05
LIMITS = Limits(32, 10**8, 10**8, 10.0)
TAR_IMAGES = 128
TILE = 340  # pixels of a photograph in a mosaic


def pack(images: list[Path], folder: Path, each: int = TAR_IMAGES) -> None:
    """WebDataset tars of the images, `each` in one."""
    folder.mkdir()
    for number, start in enumerate(range(0, len(images), each)):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for path in images[start : start + each]:
                tar.add(path.resolve(), path.name.replace(".", "_", path.name.count(".") - 1))


def recipe_of(
    folder: Path, model: str, weights: Path | None, output: str, precision: str = "fp32"
) -> Recipe:
    encoder: dict[str, Any] = {"model": model, "precision": precision}
    if weights:
        encoder["weights"] = str(weights)
    sources = {
        "pool": [{"uri": str(folder / "tars")}],
        "curated": {"one": {"uri": str(folder / "one")}},
    }
    return Recipe.model_validate(
        {
            "name": "embed",
            "output": str(folder / output),
            "sources": sources,
            "encoder": encoder,
            "resources": {"part_images": 64},
        }
    )


def cpu() -> float:
    """Processor seconds of this process and of those that it has waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def alone(cfg: EmbedConfig, images: list[Path]) -> tuple[float, float]:
    """Processor seconds an image of decoding and preparing alone, and of both models alone."""
    models = cfg.load()
    files = [path.read_bytes() for path in images]
    began = cpu()
    inputs = [[m.prepare(decode(data, LIMITS).pixels) for m in models] for data in files]
    decoding = cpu() - began
    batches = [
        [np.stack([row[which] for row in inputs[at : at + cfg.batch]]) for which in (0, 1)]
        for at in range(0, len(inputs), cfg.batch)
    ]
    for model, batch in zip(models, batches[0], strict=True):
        model(batch)
    began = cpu()
    for pair in batches:
        for model, batch in zip(models, pair, strict=True):
            model(batch)
    return decoding / len(files), (cpu() - began) / len(files)


class Files(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images by PIL and torchvision: both models' inputs in fp32."""

    def __init__(self, images: list[Path], models: tuple[VectorModel, VectorModel]) -> None:
        self._images, (semantic, copy) = images, (m.form for m in models)
        to = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        bicubic = v2.InterpolationMode.BICUBIC
        self._semantic = v2.Compose(
            [
                v2.Resize(semantic.short_side, bicubic),
                v2.CenterCrop(semantic.size),
                *to,
                v2.Normalize(semantic.mean, semantic.std),
            ]
        )
        side = (copy.size, copy.size)
        self._copy = v2.Compose([v2.Resize(side, bicubic), *to, v2.Normalize(copy.mean, copy.std)])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = Image.open(self._images[number]).convert("RGB")
        return self._semantic(image), self._copy(image)


def plain(cfg: EmbedConfig, images: list[Path]) -> float:
    """Processor seconds an image of a DataLoader and both models in fp32, as torch runs them."""
    with mock.patch.object(encoders, "ONEDNN_LINEAR", None):
        models = replace(cfg, precision="fp32").load()
    began = cpu()
    loader = torch.utils.data.DataLoader(Files(images, models), cfg.batch, num_workers=1)
    with torch.inference_mode():
        for pair in loader:
            for model, pixels in zip(models, pair, strict=True):
                torch.nn.functional.normalize(model.net(pixels), dim=1).numpy()
    del loader
    return (cpu() - began) / len(images)


def end_to_end(recipe: Recipe) -> tuple[float, int]:
    """Processor seconds an image of `embed`'s worker, its models loaded, and the images."""
    store, executor = open_store(recipe.output), TimedExecutor()
    events = Events(store)
    pipeline.run(recipe, store, lambda _: executor, events, "ingest")
    worker = EmbedWorker(pipeline.embed_config(recipe), recipe.output)
    parts = read_parts(store, "pool")
    began = cpu()
    for part in parts:
        worker(part)
    return (cpu() - began) / sum(p.rows for p in parts), sum(p.rows for p in parts)


def speed(folder: Path, images: list[Path]) -> int:
    """Prints the rates of ours, its parts and a plain loop; returns the targets missed."""
    torch.manual_seed(0)
    weights = folder / "vits.safetensors"
    save_file(timm.create_model(MODEL, num_classes=0).state_dict(), weights)
    precision = "bf16" if fast_dtype() == torch.bfloat16 else "fp32"
    recipe = recipe_of(folder, MODEL, weights, "speed", precision)
    cfg = pipeline.embed_config(recipe)
    ours, _ = end_to_end(recipe)
    decoding, models = alone(cfg, images)
    loop = plain(cfg, images)
    rows = {
        "end to end": ours,
        "decoding and resizing alone": decoding,
        "both models alone": models,
        "the two one after the other": decoding + models,
        "DataLoader, PIL, fp32": loop,
    }
    table(
        [f"{MODEL} in {precision}, the copy descriptor in fp32", "ms an image", "images/s a core"],
        [[name, f"{1e3 * s:.2f}", f"{1 / s:.2f}"] for name, s in rows.items()],
    )
    share, times = (decoding + models) / ours, loop / ours
    missed = target(f"{share:.0%} of what its parts allow, of 85 %", share >= LEAST_SHARE)
    return missed + target(f"{times:.2f} times the plain loop, of 3", times >= LEAST_TIMES)


_worker: EmbedWorker


def _begin(recipe: Recipe) -> None:
    global _worker
    one_thread()
    _worker = EmbedWorker(pipeline.embed_config(recipe), recipe.output)


def _one(part: Part) -> int:
    return int(_worker(part)["images"])


def steady(outcomes: Iterator[Any], part_rows: int) -> float:
    """Images a second from the fourth part that ends to the last."""
    ends = [time.perf_counter() for _ in outcomes]
    return (len(ends) - 4) * part_rows / (ends[-1] - ends[3])


def overhead(folder: Path, rounds: int) -> int:
    """Prints Ray's rate beside that of plain processes; returns 1 if it costs too much."""
    from curation.runtime.ray_executor import RayExecutor  # the rest works without Ray

    rates: dict[str, list[float]] = {"plain processes": [], "Ray": []}
    for number in range(rounds):
        recipe = recipe_of(folder, "lvd_demo", None, f"overhead{number}")
        store = open_store(recipe.output)
        pipeline.run(recipe, store, lambda _: TimedExecutor(), Events(store), "ingest")
        parts = [part for part in read_parts(store, "pool") if part.rows == 64]
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(2, _begin, (recipe,)) as pool:
            rates["plain processes"].append(steady(pool.imap_unordered(_one, parts), 64))
        ray = RayExecutor("local", 2)
        try:
            make = partial(EmbedWorker, pipeline.embed_config(recipe), recipe.output)
            rates["Ray"].append(steady(ray.map(make, parts), 64))
        finally:
            ray.close()
        say(f"round {number}: {rates}")
    middle = {name: float(np.median(found)) for name, found in rates.items()}
    lines = [[name, f"{rate:.1f}"] for name, rate in middle.items()]
    table([f"lvd_demo, 2 workers, {64 * len(parts):,} images", "images/s"], lines)
    lost = 1 - middle["Ray"] / middle["plain processes"]
    return target(f"Ray costs {lost:.1%} when steady, of 5 %", lost <= MOST_OVERHEAD)


def features(model: VectorModel, images: list[Path], opened: Callable[[Path], Image.Image]) -> Any:
    rows = []
    for at in range(0, len(images), 16):
        inputs = [model.prepare(opened(path)) for path in images[at : at + 16]]
        rows.append(model(np.stack(inputs)))
    return np.concatenate(rows)


def exactly(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def scaled(path: Path, side: int) -> Image.Image:
    """Decoded at the smallest eighths that keep the shorter side at least as long."""
    image = Image.open(BytesIO(path.read_bytes()))
    short = min(image.size)
    width, height = (-(-side * one // short) for one in image.size)
    image.draft("RGB", (width, height))
    return image.convert("RGB")


def mosaics(images: list[Path], folder: Path, count: int) -> list[Path]:
    """Large JPEGs of nine photographs each: few photographs at hand are large themselves."""
    made = []
    for number in range(count):
        tile = Image.new("RGB", (3 * TILE, 3 * TILE))
        for place, path in enumerate(images[number * 9 : number * 9 + 9]):
            corner = (place % 3 * TILE, place // 3 * TILE)
            tile.paste(exactly(path).resize((TILE, TILE), Image.Resampling.BICUBIC), corner)
        made.append(folder / f"{number:04d}.jpg")
        tile.save(made[-1], quality=92)
    return made


def drift(folder: Path, images: list[Path], weights: Path, count: int) -> None:
    """Prints how near features stay in bf16, and to images decoded at a fraction of their size."""
    save_file({n: v.float() for n, v in load_file(weights).items()}, folder / "exact.safetensors")
    content = (folder / "exact.safetensors").read_bytes()
    fp32, bf16 = (load_semantic(TINY, content, precision) for precision in ("fp32", "bf16"))
    large = mosaics(images, folder, count)
    few = images[:: max(1, len(images) // count)][:count]
    at_scale = partial(scaled, side=fp32.form.short_side or fp32.form.size)
    tries: list[tuple[str, list[Path], VectorModel, Callable[[Path], Image.Image]]] = [
        ("bf16", few, bf16, exactly),
        ("decoded by DCT at 1/2 or less", large, fp32, at_scale),
    ]
    lines = []
    for what, pictures, model, opened in tries:
        true, found = features(fp32, pictures, exactly), features(model, pictures, opened)
        cosine = (true * found).sum(axis=1)
        figures = [f"{cosine.mean():.5f}", f"{cosine.min():.4f}", *same(true, found)]
        lines.append([what, len(pictures), *figures])
    head = ["DeiT-tiny against fp32, exact", "images", "mean cosine", "lowest"]
    table([*head, "first neighbour stays", "of four neighbours stay"], lines)
    took = {name: cpu_of(large, opened) for name, opened in (("whole", exactly), ("DCT", at_scale))}
    print(
        f"Decoding these: {1e3 * took['whole']:.1f} ms whole, {1e3 * took['DCT']:.1f} ms scaled.\n"
    )


def cpu_of(images: list[Path], opened: Callable[[Path], Image.Image]) -> float:
    """Processor seconds an image."""
    began = cpu()
    for path in images:
        opened(path)
    return (cpu() - began) / len(images)


def same(true: Any, found: Any) -> list[str]:
    """How much of each row's nearest neighbours among the others stays."""
    ranked = []
    for rows in (true, found):
        scores = rows @ rows.T
        np.fill_diagonal(scores, -2)
        ranked.append(np.argsort(-scores, axis=1)[:, :4])
    first = (ranked[0][:, 0] == ranked[1][:, 0]).mean()
    four = np.mean([len(set(a) & set(b)) / 4 for a, b in zip(*ranked, strict=True)])
    return [f"{first:.3f}", f"{four:.3f}"]


def main(arguments: list[str] | None = None) -> int:
    """The number of targets missed."""
    parser = argparse.ArgumentParser(description="Embedding speed, and what rounding costs.")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--count", type=int, default=256, help="images of ViT-S")
    parser.add_argument("--steady", type=int, default=1280, help="images of Ray's overhead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--drift", type=int, default=128, help="images of each comparison")
    parser.add_argument("--weights", type=Path, help="of DeiT-tiny")
    options = parser.parse_args(arguments)
    print(f"{machine()}\n", flush=True)
    found = sorted(path for path in options.images.iterdir() if path.is_file())
    one_thread()
    missed = 0
    measures: list[tuple[int, Callable[[Path, list[Path]], int]]] = [
        (options.count, speed),
        (options.steady, lambda folder, _: overhead(folder, options.rounds)),
    ]
    for count, measure in measures:
        if not count:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            spread = found[:: max(1, len(found) // count)]
            chosen = list(islice(cycle(spread), count))
            pack(chosen, folder / "tars")
            (folder / "one").mkdir()
            (folder / "one" / chosen[0].name).symlink_to(chosen[0].resolve())
            missed += measure(folder, chosen)
    if options.weights:
        with tempfile.TemporaryDirectory() as name:
            drift(Path(name), found, options.weights, options.drift)
    return missed


if __name__ == "__main__":
    sys.exit(main())
