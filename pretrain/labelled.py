"""Labelled images for evaluation: class folders or a CSV -> central crops, in order."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pretrain.collate import BadSample
from pretrain.crops import resize
from pretrain.decode import BadImage, Pixels, decode
from pretrain.errors import UserError
from pretrain.samples import Ints
from pretrain.storage import Storage, open_storage
from pretrain.tar import IMAGE_EXTENSIONS
from pretrain.workers import Failure, receive

RESIZED_SHARE = 256 / 224  # shorter side before the crop : side of the crop, as DINOv2 evaluates
MAX_ASPECT = 10.0  # long : short side; else a sliver would be resized to gigabytes
Part = tuple[torch.Tensor, torch.Tensor, list[BadSample]]


@dataclass(frozen=True)
class Labelled:
    """Images by name, each with the number of its class."""

    storage: Storage
    names: list[str]
    labels: Ints  # (images,)
    classes: list[str]


def open_labelled(
    uri: str, table: Path | None = None, classes: Sequence[str] | None = None
) -> Labelled:
    """A folder or s3:// prefix with a folder a class, or with a CSV of `path` and `label`.

    Paths of the CSV are below `uri`. `classes` are those of the training set, which numbers them.
    Errors: UserError when an image has no class, or one that is not among `classes`.
    """
    storage = open_storage(uri)
    there = {name for name, _ in storage.files() if _is_image(name)}
    named = _by_folder(uri, there) if table is None else _by_table(uri, there, table)
    known = sorted({label for _, label in named}) if classes is None else list(classes)
    numbers = {label: number for number, label in enumerate(known)}
    for name, label in named:
        if label not in numbers:
            raise UserError(f"{uri}: {name} is of class '{label}', which the training set lacks")
    if len(known) < 2:
        raise UserError(f"{uri}: one class only ('{known[0]}'); there is nothing to tell apart")
    labels = np.array([numbers[label] for _, label in named], np.int64)
    return Labelled(storage, [name for name, _ in named], labels, known)


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _by_folder(uri: str, there: set[str]) -> list[tuple[str, str]]:
    """(name, class), sorted."""
    if not there:
        raise UserError(f"{uri}: holds no images; wanted {uri.rstrip('/')}/CLASS/*.jpg")
    loose = sorted(name for name in there if "/" not in name)
    if loose:
        raise UserError(
            f"{uri}: {loose[0]} lies in no class folder; wanted {uri.rstrip('/')}/CLASS/*.jpg, or "
            "a CSV with the columns path and label"
        )
    return [(name, name.partition("/")[0]) for name in sorted(there)]


def _by_table(uri: str, there: set[str], table: Path) -> list[tuple[str, str]]:
    """(name, class) in the order of the CSV."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            lacking = {"path", "label"} - set(reader.fieldnames or ())
            if lacking:
                raise UserError(f"{table}: no column '{min(lacking)}'; wanted path and label")
            rows = [(row["path"] or "", row["label"] or "") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{table}: can't be read as CSV: {reason}") from None
    if not rows:
        raise UserError(f"{table}: lists no images")
    for number, (name, label) in enumerate(rows, 1):
        if name not in there or not label:
            fault = f"no image '{name}' in {uri}" if name not in there else "an empty label"
            raise UserError(f"{table}: row {number}: {fault}")
    return rows


def central_crop(image: Pixels, size: int) -> Pixels:
    """(H, W, 3) -> (3, size, size): shorter side to 8/7 of `size`, bicubic, then the middle.

    Errors: BadImage for slivers.
    """
    height, width = image.shape[:2]
    short = round(size * RESIZED_SHARE)
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise BadImage(f"extreme_aspect {width}x{height}, at most {MAX_ASPECT:g} : 1")
    tall, wide = (int(short * side / min(height, width)) for side in (height, width))
    top, left = (round((side - size) / 2) for side in (tall, wide))
    return resize(image, tall, wide)[:, top : top + size, left : left + size]


class _Parts(Dataset[Part | Failure]):
    """Batches by number."""

    def __init__(self, images: Labelled, size: int, batch: int) -> None:
        self._images, self._size, self._batch = images, size, batch

    def __len__(self) -> int:
        return -(-len(self._images.names) // self._batch)

    def __getitem__(self, number: int) -> Part | Failure:
        images, bad = self._images, list[BadSample]()
        crops: list[Pixels] = []
        labels: list[int] = []
        block = slice(number * self._batch, (number + 1) * self._batch)
        for name, label in zip(images.names[block], images.labels[block].tolist(), strict=True):
            try:
                crops.append(central_crop(decode(images.storage.read(name)), self._size))
                labels.append(label)
            except BadImage as error:
                bad.append(BadSample(images.storage.uri, name, str(error)))
            except UserError as error:
                return Failure(str(error))
        stacked = np.stack(crops) if crops else np.empty((0, 3, self._size, self._size), np.uint8)
        return torch.from_numpy(stacked), torch.tensor(labels, dtype=torch.int64), bad


class LabelledLoader:
    """Iterates once over (B, 3, size, size) uint8 central crops and their (B,) labels, in order.

    Images that can't be decoded are left out, and named in `bad`. Errors: UserError.
    """

    def __init__(self, images: Labelled, batch: int, size: int = 224, workers: int = 4) -> None:
        self._workers = workers
        self._parts = _Parts(images, size, batch)
        self.bad: list[BadSample] = []

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.bad = []
        pin = torch.cuda.is_available()
        loader = DataLoader(self._parts, None, num_workers=self._workers, pin_memory=pin)
        parts = iter(loader)
        for _ in range(len(self._parts)):
            crops, labels, bad = receive(parts, self._workers)
            self.bad += bad
            if len(labels):
                yield crops, labels
