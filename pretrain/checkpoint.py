"""Checkpoints of a run: written beside training, whole or not at all, read on any number of ranks.

`checkpoints/00001000/`  torch.distributed.checkpoint files and `progress.json`
A folder gets its name by a rename when all its files are complete. Random numbers need no place
in it: every draw is a function of (seed, iteration, rank), and the data of its position.
"""

import json
import os
import re
import shutil
import warnings
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from pretrain import distributed
from pretrain.errors import UserError
from pretrain.student_teacher import StudentTeacher

# One process needs no process group, and need not be told so at each checkpoint.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

FOLDER = "checkpoints"
CONFIG = "config.yaml"


@dataclass
class Progress:
    """What a run needs beside its tensors."""

    iteration: int  # steps that are done
    data: dict[str, Any]  # `Loader.state()`
    scaler: dict[str, Any]  # of the fp16 loss, or empty


def folders(run: Path) -> list[Path]:
    """Complete checkpoints of a run, the oldest first."""
    found = (run / FOLDER).glob("*") if (run / FOLDER).is_dir() else []
    return sorted(path for path in found if re.fullmatch(r"\d{8,}", path.name))


def latest(run: Path) -> Path:
    """The last complete checkpoint. Errors: UserError where there is none."""
    if not (run / CONFIG).is_file():
        raise UserError(f"{run}: no run of `pretrain train`: it has no {CONFIG}")
    found = folders(run)
    if not found:
        raise UserError(f"{run}: has no complete checkpoint yet")
    return found[-1]


class Writer:
    """Saves in the background, at most one at a time."""

    def __init__(self, run: Path, keep: int) -> None:
        self._run, self._keep = run, keep
        self._group = distributed.own_group()
        self._pending: tuple[Future[Any], Path, Progress] | None = None
        if distributed.rank() == 0:
            (run / FOLDER).mkdir(parents=True, exist_ok=True)
            for partial in (run / FOLDER).glob("*.partial"):
                shutil.rmtree(partial)
        distributed.barrier()

    def save(
        self, model: StudentTeacher, optimizer: torch.optim.Optimizer, progress: Progress
    ) -> None:
        """Copies the state and returns; it is complete at the next call of `save` or `finish`."""
        self.finish()
        partial = self._run / FOLDER / f"{progress.iteration:08d}.partial"
        try:
            future = async_save(
                _state(model, optimizer),
                checkpoint_id=partial,
                process_group=self._group,
                no_dist=self._group is None,
            )
        except (OSError, RuntimeError, CheckpointException) as error:
            raise _not_written(partial, error) from None
        assert isinstance(future, Future)
        self._pending = (future, partial, progress)

    def finish(self) -> None:
        """Waits for what is being saved. Errors: UserError; earlier checkpoints stay."""
        if self._pending is None:
            return
        future, partial, progress = self._pending
        self._pending = None
        try:
            future.result()
            if distributed.rank() == 0:
                text = json.dumps(progress.__dict__)
                (partial / "progress.json").write_text(text)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise _not_written(partial, error) from None
        distributed.barrier()
        if distributed.rank() == 0:
            os.replace(partial, partial.with_suffix(""))
            for old in folders(self._run)[: -self._keep]:
                shutil.rmtree(old)


def _not_written(partial: Path, error: BaseException) -> UserError:
    """The first line that says why; the last good checkpoint is untouched."""
    cause: BaseException | None = error
    while cause and not isinstance(cause, OSError):
        failures = getattr(cause, "failures", {})
        cause = next((f[0] for f in failures.values()), cause.__cause__)
    why = str(cause or error).strip().split("\n")[0]
    shutil.rmtree(partial, ignore_errors=True)
    return UserError(f"{partial.with_suffix('')}: the checkpoint can't be written: {why}")


def read(
    path: Path, model: StudentTeacher, optimizer: torch.optim.Optimizer | None = None
) -> Progress:
    """Loads a checkpoint of any world size into a model, and an optimizer where one is given.

    Errors: UserError for one of another architecture, or one that can't be read.
    """
    try:
        progress = Progress(**json.loads((path / "progress.json").read_text()))
        state = _state(model, optimizer)
        _check_shapes(path, state["model"])
        load(state, checkpoint_id=path, no_dist=distributed.world_size() == 1)
    except (OSError, RuntimeError, KeyError, TypeError, CheckpointException) as error:
        why = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: can't be read: {why}") from None
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return progress


def _check_shapes(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Every tensor is there, in the same shape."""
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    for name, value in state.items():
        there = getattr(saved.get(f"model.{name}"), "size", None)
        if there is None:
            raise UserError(f"{path}: of another architecture: it has no {name}")
        if tuple(there) != tuple(value.shape):
            raise UserError(
                f"{path}: of another architecture: {name} is {tuple(there)} there, "
                f"{tuple(value.shape)} here"
            )


def _state(model: StudentTeacher, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Without a frozen teacher, which a run reads from where it first was."""
    whole = get_model_state_dict(model)
    kept = {name: value for name, value in whole.items() if not name.startswith("frozen.")}
    state: dict[str, Any] = {"model": kept}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    return state
