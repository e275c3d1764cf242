"""What a run says of itself: `metrics.jsonl` (which services read), TensorBoard, a progress bar."""

import json
import math
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pretrain import distributed
from pretrain.config import Config
from pretrain.knn_eval import Probe
from pretrain.precision import Precision
from pretrain.schedules import Schedules
from pretrain.stream import Loader
from pretrain.student_teacher import StudentTeacher

METRICS = "metrics.jsonl"
LINE_S = 30.0  # between lines of a log
SECTIONS = {  # of TensorBoard, which shows names before a slash together
    "losses": ("loss", "dino_global", "dino_local", "ibot", "koleo"),
    "teacher": ("teacher_entropy", "prototype_usage", "knn_accuracy", "feature_rank"),
    "schedules": Schedules._fields,
    "speed": ("images_per_s", "step_s", "data_wait", "peak_gib"),
}


class Watch:
    """Means of the last `log_every` iterations over all ranks; only rank 0 writes."""

    def __init__(self, config: Config, out: Path, iteration: int, precision: Precision) -> None:
        self._config, self._out, self._precision = config, out, precision
        self._writes = distributed.rank() == 0
        self._sums: dict[str, torch.Tensor] = {}
        self._batches, self._skipped = 0, 0
        self._since, self._waited, self._from = time.monotonic(), 0.0, iteration
        every = config.watch.evaluate_every
        self._probe = Probe.of(config) if every else None
        self._board = _tensorboard(out, iteration) if self._writes else None
        if self._writes:
            _forget(out / METRICS, iteration)
        screen = shutil.get_terminal_size()  # 80 x 24 for one that doesn't know
        self._bar = tqdm(
            total=config.schedule.iterations,
            initial=iteration,
            unit="it",
            ncols=screen.columns,
            nrows=screen.lines,
            disable=not self._writes or not sys.stderr.isatty(),
        )
        self._told = -LINE_S

    def say(self, text: str) -> None:
        """A line for who watches, above the bar."""
        if self._writes:
            tqdm.write(text, file=sys.stderr)

    def add(self, values: Mapping[str, torch.Tensor], total: torch.Tensor) -> None:
        """Values of one batch; nothing is read from the device yet."""
        for name, value in {"loss": total, **values}.items():
            value = value.float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._batches += 1

    def skip(self, iteration: int, what: str) -> None:
        """A step that was left out."""
        self._skipped += 1
        self.say(f"iteration {iteration + 1}: {what} not finite, left out")
        if self._writes:
            self._write({"iteration": iteration + 1, "skipped": what})

    def iteration(
        self,
        now: int,
        norms: Mapping[str, torch.Tensor],
        rates: Schedules,
        loader: Loader,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Every `log_every` iterations a line; `now` counts from 0, lines count what is done."""
        self._bar.update()
        every = self._config.watch.log_every
        if not every or (now + 1) % every or not self._batches:
            return
        names = sorted(self._sums)
        means = torch.stack([self._sums[name] for name in names]) / self._batches
        means = distributed.all_reduce_sum(means) / distributed.world_size()
        line: dict[str, Any] = {"iteration": now + 1, "epoch": self._epoch(loader)}
        line |= dict(zip(names, means.tolist(), strict=True))
        line |= {f"gradient_norm/{name}": float(norm) for name, norm in norms.items()}
        line |= {name: float(values[now]) for name, values in rates._asdict().items()}
        line |= self._speed(now + 1, loader)
        line["bad_images"] = loader.bad_before + int(self._over_ranks(sum(loader.bad.values())))
        if scaler.is_enabled():
            line["loss_scale"] = scaler.get_scale()
        line["skipped_steps"] = self._skipped
        self._sums, self._batches = {}, 0
        if self._writes:
            self._write(line)
            self._show(line)

    def evaluate(self, done: int, model: StudentTeacher) -> None:
        """kNN accuracy and feature rank of the EMA teacher, every `evaluate_every` iterations."""
        every = self._config.watch.evaluate_every
        if not every or (done % every and done != self._config.schedule.iterations):
            return
        assert self._probe is not None
        began = time.monotonic()
        found = self._probe.measure(model.teacher["backbone"], self._precision)
        if self._writes:
            self._write({"iteration": done, **found})
        self.say(f"iteration {done}: " + ", ".join(f"{n} {v:.4g}" for n, v in found.items()))
        self._since += time.monotonic() - began  # is no time of training

    def _show(self, line: Mapping[str, Any]) -> None:
        """Beside the bar; a log has no bar, but now and then a line."""
        if not self._bar.disable:
            self._bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
            return
        total, done = self._config.schedule.iterations, line["iteration"]
        if time.monotonic() - self._told < LINE_S and done != total:
            return
        self._told = time.monotonic()
        left = tqdm.format_interval(int((total - done) * line["step_s"]))
        self.say(
            f"iteration {done} of {total}: loss {line['loss']:.3f}, "
            f"{line['images_per_s']:.4g} images/s, {line['data_wait']:.0%} waiting for data, "
            f"{left} left"
        )

    def close(self) -> None:
        self._bar.close()
        if self._board is not None:
            self._board.close()

    def _speed(self, done: int, loader: Loader) -> dict[str, float]:
        seconds = time.monotonic() - self._since
        iterations, waited = done - self._from, loader.waited_s - self._waited
        self._since, self._waited, self._from = time.monotonic(), loader.waited_s, done
        found = {
            "images_per_s": iterations * self._config.schedule.batch / seconds,
            "step_s": seconds / iterations,
            "data_wait": self._over_ranks(waited / seconds) / distributed.world_size(),
        }
        if self._precision.device.type == "cuda":
            found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return found

    def _over_ranks(self, value: float) -> float:
        """The sum; all ranks call it."""
        one = torch.tensor(value, dtype=torch.float64, device=self._precision.device)
        return float(distributed.all_reduce_sum(one))

    @staticmethod
    def _epoch(loader: Loader) -> float:
        return loader.position / loader.samples_per_epoch

    def _write(self, line: dict[str, Any]) -> None:
        """What is not finite is null: JSON has no word for it."""
        line = {name: _finite_or_none(value) for name, value in line.items()}
        stamped = {"time": round(time.time(), 3), **line}
        with (self._out / METRICS).open("a") as file:
            file.write(json.dumps(stamped, allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name != "iteration":
                    self._board.add_scalar(_tag(name), value, line["iteration"])


def _tag(name: str) -> str:
    """Where TensorBoard shows a value."""
    if "/" in name:
        return name
    return f"{next((s for s, names in SECTIONS.items() if name in names), 'run')}/{name}"


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _forget(path: Path, iteration: int) -> None:
    """Drops lines of steps that are done again, and a line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)


def _tensorboard(out: Path, iteration: int) -> Any:
    """A writer, where the package is installed; hides steps that are done again."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    purge = iteration + 1 if iteration else None
    return SummaryWriter(str(out / "tensorboard"), purge_step=purge)
