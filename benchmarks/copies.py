"""How well copies are found: `python -m benchmarks.copies --images FOLDER > table.md`.

Makes edited copies of some of the folder's images and looks for them among all of its images, with
the built-in copy descriptor, the built-in semantic encoder, pHash and PDQ. A link between a copy
and any other image counts as wrong, also where the folder itself holds the same photo twice.
"""

import argparse
import csv
import hashlib
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm import tqdm

from benchmarks.copy_transforms import TRANSFORMS
from benchmarks.measuring import target
from benchmarks.perceptual_hashes import PDQ, PHash
from curation.algorithms.components import Components, Ints
from curation.images.encoders import (
    DEMO_MODEL,
    VectorModel,
    copy_thresholds,
    load_copy_descriptor,
    load_semantic,
)

Rows = NDArray[np.float32]
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
BLOCK = 1024  # rows of one product
PRECISIONS = (0.95, 0.99)


class Descriptor(Protocol):
    """Images to unit-norm rows, and the cosines worth a column."""

    name: str
    thresholds: dict[str, float]

    def rows(self, images: Sequence[Image.Image]) -> Rows: ...


class ModelDescriptor:
    """A built-in model of curation."""

    def __init__(self, name: str, model: VectorModel, thresholds: Sequence[float]) -> None:
        self.name = name
        self.thresholds = {f"{cosine:.2f}": cosine for cosine in thresholds}
        self._model = model

    def rows(self, images: Sequence[Image.Image]) -> Rows:
        return self._model(np.stack([self._model.prepare(image) for image in images]))


@dataclass(frozen=True)
class Measured:
    """Rows of one descriptor: the folder (N, D), and copies (T, C, D) of its rows `originals`."""

    folder: Rows
    copies: Rows
    originals: NDArray[np.int64]


def load(path: Path) -> Image.Image | None:
    """Upright RGB, or None for a file that does not decode."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def measure(
    descriptors: Sequence[Descriptor], paths: Sequence[Path], count: int, seed: int
) -> list[Measured]:
    """Describe every image once, and TRANSFORMS of the `count` with the smallest name hashes.

    That choice holds out, on the folder the built-in descriptor was trained on, only images that
    its training left out (it leaves out those with a hash below 11 %).
    """
    chosen = set(sorted(range(len(paths)), key=lambda n: name_hash(paths[n]))[:count])
    folder: list[list[Rows]] = [[] for _ in descriptors]
    copies: list[list[Rows]] = [[] for _ in descriptors]
    originals = []
    for number, path in enumerate(tqdm(paths, desc="images", file=sys.stderr)):
        image = load(path)
        if image is None:
            continue
        if number in chosen:
            originals.append(len(folder[0]))
            rng = np.random.default_rng([seed, number])
            edited = [edit(image, rng) for edit in TRANSFORMS.values()]
        for which, descriptor in enumerate(descriptors):
            folder[which].append(descriptor.rows([image])[0])
            if number in chosen:
                copies[which].append(descriptor.rows(edited))
    return [
        Measured(np.stack(f), np.stack(c).transpose(1, 0, 2), np.array(originals))
        for f, c in zip(folder, copies, strict=True)
    ]


def name_hash(path: Path) -> bytes:
    return hashlib.sha256(path.name.encode()).digest()


def pair_table(descriptor: Descriptor, measured: Measured) -> list[str]:
    """Rows: transforms. Cells: share of copies linked to their original / share of right links."""
    lines = table_head("recall / precision", list(descriptor.thresholds))
    everything = []
    for transform, copies in zip(TRANSFORMS, measured.copies, strict=True):
        cosine = copies @ measured.folder.T  # (C, N)
        line = np.arange(len(copies))
        right = cosine[line, measured.originals].copy()
        cosine[line, measured.originals] = -1.0
        found = [
            (int((right >= least).sum()), int((cosine >= least).sum()))
            for least in descriptor.thresholds.values()
        ]
        everything.append(found)
        lines.append(pair_line(transform, found, len(copies)))
    total = np.array(everything).sum(axis=0)
    copies_total = measured.copies.shape[0] * measured.copies.shape[1]
    lines.append(pair_line("**all**", total.tolist(), copies_total))
    return lines


@dataclass(frozen=True)
class Scores:
    """Cosines of copies with their originals (T, C), and with every other image (n,), rising."""

    right: Rows
    wrong: Rows

    @classmethod
    def of(cls, measured: Measured) -> "Scores":
        line = np.arange(len(measured.originals))
        other = np.arange(len(measured.folder)) != measured.originals[:, None]  # (C, N)
        right, wrong = [], []
        for copies in measured.copies:
            cosine = copies @ measured.folder.T  # (C, N)
            right.append(cosine[line, measured.originals])
            wrong.append(cosine[other])
        return cls(np.stack(right), np.sort(np.concatenate(wrong)))

    def recall(self, precision: float) -> NDArray[np.float64]:
        """By transform (T,), at the loosest threshold that has the precision over all pairs."""
        reached = np.sort(self.right.ravel())
        right = len(reached) - np.arange(len(reached))  # links at the cosine of each right pair
        wrong = len(self.wrong) - np.searchsorted(self.wrong, reached)
        enough = reached[right >= precision * (right + wrong)]
        least = enough[0] if len(enough) else np.inf
        share: NDArray[np.float64] = np.mean(self.right >= least, axis=1)
        return share


def precision_tables(descriptors: Sequence[Descriptor], measured: Sequence[Measured]) -> int:
    """Recall by transform of all descriptors, the first is ours; how many targets it missed."""
    scores, missed = [Scores.of(one) for one in measured], 0
    for precision in PRECISIONS:
        recalls = np.stack([one.recall(precision) for one in scores], axis=1)  # (T, descriptors)
        head = table_head(f"recall at precision {precision}", [one.name for one in descriptors])
        lines = [
            f"| {name} | {' | '.join(f'{value:.3f}' for value in row)} |"
            for name, row in [*zip(TRANSFORMS, recalls, strict=True), ("**all**", recalls.mean(0))]
        ]
        print("\n".join(head + lines), end="\n\n")
        ours, best = recalls[:, 0], recalls[:, 1:].max(axis=1)
        ahead = bool((recalls.mean(0)[0] > recalls.mean(0)[1:]).all())
        what = f"at precision {precision} ours is ahead of all of them"
        missed += target(f"{what}, over all edits", ahead)
        behind = [name for name, a, b in zip(TRANSFORMS, ours, best, strict=True) if a < b]
        missed += target(f"{what}, or level, edit by edit (behind: {len(behind)})", not behind)
    return missed


def pair_line(name: str, found: Sequence[Sequence[int]], copies: int) -> str:
    cells = [
        f"{right / copies:.3f} / " + (f"{right / (right + wrong):.3f}" if right + wrong else "-")
        for right, wrong in found
    ]
    return f"| {name} | {' | '.join(cells)} |"


def group_table(descriptor: Descriptor, measured: Measured) -> list[str]:
    """What connected components make of an original and all of its copies, and of the folder."""
    images, (kinds, chosen, _) = len(measured.folder), measured.copies.shape
    nodes = np.concatenate([measured.folder, measured.copies.reshape(kinds * chosen, -1)])
    source = np.concatenate([np.arange(images), np.tile(measured.originals, kinds)])
    columns = []
    for least in descriptor.thresholds.values():
        alone = linked(measured.folder, least)
        labels = linked(nodes, least)
        of_copy = labels[images:].reshape(kinds, chosen)
        joined = of_copy == labels[measured.originals][None, :]  # (T, C)
        mixed = [len(np.unique(source[labels == labels[o]])) > 1 for o in measured.originals]
        sizes = np.bincount(labels)
        columns.append(
            [
                f"{joined.all(axis=0).mean():.3f}",
                f"{joined.mean():.3f}",
                f"{np.mean(mixed):.3f}",
                f"{sizes.max()}",
                f"{1 - len(np.unique(alone)) / images:.4f}",
            ]
        )
    names = (
        "groups found whole",
        "copies in their original's group",
        "groups with another image in them",
        f"largest group (right: {kinds + 1})",
        "share of the folder itself removed as copies",
    )
    cells = [f"| {name} | {' | '.join(c[i] for c in columns)} |" for i, name in enumerate(names)]
    return table_head("groups", list(descriptor.thresholds)) + cells


def linked(rows: Rows, least: float) -> Ints:
    """The component of each row where rows at `least` cosine or more are joined."""
    components = Components(len(rows))
    for start in range(0, len(rows), BLOCK):
        left, right = np.nonzero(rows[start : start + BLOCK] @ rows.T >= least)
        components.add(left + start, right)
    return components.labels()


def labelled_table(descriptors: Sequence[Descriptor], labels: Path) -> list[str]:
    """Cosine of each labelled pair (columns copy, reference, transform; paths beside the file)."""
    lines = table_head("labelled copy", [descriptor.name for descriptor in descriptors])
    with labels.open(newline="") as file:
        for row in csv.DictReader(file):
            pair = [load(labels.parent / row["copy"]), load(labels.parent / row["reference"])]
            images = [image for image in pair if image is not None]
            if len(images) < 2:
                continue
            rows = [descriptor.rows(images) for descriptor in descriptors]
            cells = " | ".join(f"{float(r[0] @ r[1]):.3f}" for r in rows)
            lines.append(f"| {Path(row['copy']).stem} ({row['transform']}) | {cells} |")
    return lines


def table_head(first: str, columns: Sequence[str]) -> list[str]:
    return ["", f"| {first} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]


def builtin_descriptors() -> list[Descriptor]:
    own = copy_thresholds(True)
    cosines = sorted({0.5, 0.6, 0.7, 0.8, own["min_cosine"], own["holdout_min_cosine"]})
    return [
        ModelDescriptor("copy descriptor", load_copy_descriptor(None), cosines),
        ModelDescriptor(
            "semantic encoder", load_semantic(DEMO_MODEL, None, "fp32"), (0.8, 0.9, 0.95, 0.98)
        ),
        PHash(),
        PDQ(),
    ]


def processor() -> str:
    """Linux names the model; elsewhere the architecture must do."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="folder of photos")
    parser.add_argument("--count", type=int, default=500, help="images to make copies of")
    parser.add_argument("--labelled", type=Path, help="CSV of known copies, as copydet.csv")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    paths = sorted(p for p in options.images.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        parser.error(f"--images {options.images}: holds no images")
    torch.set_num_threads(1)
    descriptors = builtin_descriptors()
    measured = measure(descriptors, paths, options.count, options.seed)
    print(f"# Copies, {date.today()}\n")
    print(f"{processor()}, one thread, torch {torch.__version__}.")
    print(f"{len(measured[0].folder)} images, {len(TRANSFORMS)} copies of each of", end=" ")
    print(f"{len(measured[0].originals)}, seed {options.seed}.")
    print("\n## All of them, each at the loosest threshold that is precise enough")
    missed = precision_tables(descriptors, measured)
    for descriptor, rows in zip(descriptors, measured, strict=True):
        print(f"\n## {descriptor.name} ({rows.folder.shape[1]} values)")
        print("\n".join(pair_table(descriptor, rows) + group_table(descriptor, rows)))
    if options.labelled:
        print("\n## Labelled copies (cosine)")
        print("\n".join(labelled_table(descriptors, options.labelled)))
    return missed


if __name__ == "__main__":
    sys.exit(main())
