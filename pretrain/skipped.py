"""Steps that a run left out since they were not finite, kept for `pretrain replay`.

`replay/00001000.rank0.pt`   a batch, and what its masks were drawn by
`replay/00001000.weights/`   a checkpoint of the networks before the first such step in a row

One folder of weights at a time: those of an earlier row are removed.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain import checkpoint, distributed
from pretrain.collate import Batch
from pretrain.errors import UserError
from pretrain.student_teacher import StudentTeacher

FOLDER = "replay"
WEIGHTS = ".weights"


@dataclass(frozen=True)
class Skipped:
    """A step of this rank, and the batch of it that was not finite, or the last."""

    iteration: int  # steps that were done before
    number: int  # of the batch, among those of all ranks and accumulated ones
    what: str  # "loss" or "gradients"
    loss_scale: float  # 1 unless in fp16
    crops: Batch


def keep(run: Path, step: Skipped, model: StudentTeacher | None) -> None:
    """All ranks call it, with the model for the first step in a row.

    What can't be written is told, and the run goes on.
    """
    folder = run / FOLDER
    crops = step.crops._replace(bad=[])
    try:
        folder.mkdir(exist_ok=True)
        path = folder / f"{step.iteration:08d}.rank{distributed.rank()}.pt"
        torch.save({**step.__dict__, "crops": crops._asdict()}, path)
    except (OSError, RuntimeError) as error:
        print(f"warning: {folder}: a batch can't be kept: {error}", file=sys.stderr)
    if model is None:
        return
    try:
        checkpoint.save_weights(folder / f"{step.iteration:08d}{WEIGHTS}", model, step.iteration)
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr)
        return
    if distributed.rank() == 0:
        for old in sorted(folder.glob(f"*{WEIGHTS}"))[:-1]:
            shutil.rmtree(old)


def read(path: Path) -> Skipped:
    """What `keep` wrote. Errors: UserError."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        return Skipped(**{**found, "crops": Batch(**found["crops"])})
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # of pickle, zip, other contents
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: no batch of a run's folder {FOLDER}/: {why}") from None


def weights_before(run: Path, iteration: int) -> Path:
    """The last weights that were saved before an iteration. Errors: UserError for none."""
    found = [*checkpoint.folders(run), *(run / FOLDER).glob(f"*{WEIGHTS}")]
    found = [path for path in found if int(path.stem) <= iteration]
    if not found:
        raise UserError(f"{run}: has no weights of iteration {iteration} or before")
    return max(found, key=lambda path: int(path.stem))
