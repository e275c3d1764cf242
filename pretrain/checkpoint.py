"""Checkpoints of a run: written beside training, whole or not at all, read on any number of ranks.

`checkpoints/00001000/`  torch.distributed.checkpoint files and `progress.json`
A folder gets its name by a rename when all its files are complete. Random numbers need no place
in it: every draw is a function of (seed, iteration, rank), and the data of its position.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
from concurrent.futures import Future, wait
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
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from pretrain import distributed
from pretrain.errors import UserError
from pretrain.student_teacher import StudentTeacher

# One process needs no process group, and need not be told so at each checkpoint.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

FOLDER = "checkpoints"
CONFIG = "config.yaml"
PROGRESS = "progress.json"
ANCHORS = ("_head.mean", "_head.features")  # of `frozen.Anchors`
BY_PARAMETER = StateDictOptions(flatten_optimizer_state_dict=True)


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


def latest(run: Path, iteration: int | None = None) -> Path:
    """The last complete checkpoint, or that of an iteration. Errors: UserError for none."""
    if not (run / CONFIG).is_file():
        raise UserError(f"{run}: no run of `pretrain train`: it has no {CONFIG}")
    found = folders(run)
    if not found:
        raise UserError(f"{run}: has no complete checkpoint yet")
    if iteration is not None:
        found = [path for path in found if int(path.name) == iteration]
        if not found:
            raise UserError(f"{run}: has no checkpoint of iteration {iteration} any more")
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
        """Copies the state and returns; what it writes is complete once `poll` has seen it."""
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

    def poll(self) -> None:
        """Gives what has been written meanwhile its name. Errors: as `finish`."""
        if self._pending is not None and self._pending[0].done():
            self._publish()

    def finish(self) -> None:
        """Waits for what is being saved. Errors: UserError; earlier checkpoints stay."""
        if self._pending is not None:
            self._publish()
        distributed.barrier()

    def close(self, timeout_s: float = 60.0) -> None:
        """Of a run that fails: keeps what is complete or soon will be, and says nothing more."""
        if self._pending is None:
            return
        with contextlib.suppress(TimeoutError, UserError):
            wait([self._pending[0]], timeout_s)
            self.poll()

    def _publish(self) -> None:
        """Rank 0's write ends when all ranks have written: it can give the name by itself."""
        assert self._pending is not None
        future, partial, progress = self._pending
        self._pending = None
        try:
            future.result()
            if distributed.rank() == 0:
                (partial / PROGRESS).write_text(json.dumps(progress.__dict__))
                os.replace(partial, partial.with_suffix(""))
        except (OSError, RuntimeError, CheckpointException) as error:
            raise _not_written(partial, error) from None
        if distributed.rank() == 0:
            for old in folders(self._run)[: -self._keep]:
                shutil.rmtree(old)


def save_weights(path: Path, model: StudentTeacher, iteration: int) -> None:
    """A checkpoint without an optimizer, at once; all ranks call it. Errors: UserError."""
    partial = path.with_suffix(".partial")
    try:
        save(_state(model, None), checkpoint_id=partial, no_dist=distributed.world_size() == 1)
        if distributed.rank() == 0:
            (partial / PROGRESS).write_text(json.dumps(Progress(iteration, {}, {}).__dict__))
            os.replace(partial, path)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise _not_written(partial, error) from None


def _not_written(partial: Path, error: BaseException) -> UserError:
    """The last good checkpoint is untouched."""
    shutil.rmtree(partial, ignore_errors=True)
    return UserError(f"{partial.with_suffix('')}: the checkpoint can't be written: {_why(error)}")


def _why(error: BaseException) -> str:
    """The first sentence of what the first rank that failed says."""
    cause: BaseException | None = error
    while cause and not isinstance(cause, OSError):
        failures = getattr(cause, "failures", {})
        deeper = next((f[0] for f in failures.values()), cause.__cause__)
        if deeper is None:
            break
        cause = deeper
    first = str(cause or error).strip().split("\n")[0].split(". ")[0]
    return first or type(cause or error).__name__


def read(
    path: Path, model: StudentTeacher, optimizer: torch.optim.Optimizer | None = None
) -> Progress:
    """Loads a checkpoint of any world size into a model, and an optimizer where one is given.

    The optimizer keeps its own groups: their rates are this run's, not the checkpoint's. Errors:
    UserError for one of another architecture, or one that can't be read.
    """
    state = _state(model, optimizer)
    try:
        progress = Progress(**json.loads((path / PROGRESS).read_text()))
        _check_shapes(path, state["model"])
        load(state, checkpoint_id=path, no_dist=distributed.world_size() == 1)
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # of pickle, zip, JSON, whatever reads them
        raise UserError(
            f"{path}: the checkpoint is damaged ({_why(error)}); remove that folder to go on from "
            "the one before it"
        ) from None
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    if optimizer is not None:
        groups = get_optimizer_state_dict(model, optimizer, options=BY_PARAMETER)
        set_optimizer_state_dict(
            model, optimizer, {**groups, **state["optimizer"]}, options=BY_PARAMETER
        )
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
    """Of a frozen teacher only its anchors: its weights are read from where they first were."""
    whole = get_model_state_dict(model)
    kept = {
        name: value
        for name, value in whole.items()
        if not name.startswith("frozen.") or name.endswith(ANCHORS)
    }
    state: dict[str, Any] = {"model": kept}
    if optimizer is not None:
        flat = get_optimizer_state_dict(model, optimizer, options=BY_PARAMETER)
        state["optimizer"] = {n: value for n, value in flat.items() if n.startswith("state.")}
    return state
