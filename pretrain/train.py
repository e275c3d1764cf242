"""The training loop on one page: batch, losses, backward, clip, AdamW, EMA; READ FIRST.

Nothing is remembered between steps but tensors and a position in the data: masks and drop path are
drawn by (seed, iteration, batch of the step), so that a resumed run goes on as if never stopped.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pretrain import checkpoint, distributed, precision, skipped
from pretrain.checkpoint import Progress
from pretrain.collate import Batch as Crops
from pretrain.collate import normalise
from pretrain.config import Config, to_yaml
from pretrain.errors import UserError
from pretrain.frozen import Anchors, blocks_of, fill_anchors, load_teacher
from pretrain.initial import begin_with
from pretrain.masking import draw_masks, hide_nothing
from pretrain.param_groups import adamw, param_groups, set_rates
from pretrain.samples import Source
from pretrain.schedules import schedules
from pretrain.stream import Loader, StreamConfig
from pretrain.student_teacher import Batch, StudentTeacher, clip_gradients
from pretrain.vit import ViT, compile_blocks
from pretrain.watch import Watch

SEEDS = 1 << 63
BAD = "bad.jsonl"  # images that can't be decoded
LEAST_SCALE = 1.0  # of the fp16 loss: gradients that overflow even so are not finite at all


@dataclass(frozen=True)
class Begin:
    """Where a run begins: anew, from the weights of another run, or where it was stopped."""

    weights: Path | None = None  # a file of them, in official, timm's or transformers' names
    checkpoint: Path | None = None  # of another run
    resumed: Path | None = None  # a checkpoint of this run


def train(config: Config, source: Source, out: Path, begin: Begin = Begin()) -> None:
    """Trains on the ranks that torchrun started, or alone; writes `out`. Errors: UserError."""
    device = precision.this_device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cpu":
        precision.keep_freed_memory()
    with distributed.process_group(device):
        Training(config, source, out, begin, device).run()


class Training:
    """A run on this rank."""

    def __init__(
        self, config: Config, source: Source, out: Path, begin: Begin, device: torch.device
    ) -> None:
        self.config, self.out, self.device = config, out, device
        self.precision = precision.choose(config.parallel.precision, device)
        self.rates = schedules(config.schedule)
        self.images = images_per_batch(config, distributed.world_size())
        torch.manual_seed(config.data.seed)  # the same start on every rank
        data_config = config.data
        stream = StreamConfig(
            self.images,
            data_config.seed,
            data_config.window,
            data_config.workers,
            data_config.max_bad_share,
        )
        self.model = model_of(config, device)
        if begin.weights is not None:
            told = begin_with(begin.weights, self.model)
            if distributed.rank() == 0:
                print(told, file=sys.stderr)
        if begin.resumed is None:
            self._fill_anchors(source, stream)
        self.spread = _spread(self.model, config, self.precision)
        optimizer = config.optimizer
        groups = param_groups(self.model.student, optimizer.layer_decay, optimizer.patch_embed_lr)
        self.optimizer = adamw(groups, optimizer.betas)
        self.scaler = self.precision.scaler()
        self.iteration, data = self._begin(begin)
        ranks = distributed.rank(), distributed.world_size()
        self.loader = Loader(source, config.crops, stream, *ranks, data, out / BAD)
        self.writer = checkpoint.Writer(out, config.watch.keep)
        if distributed.rank() == 0:
            _write_whole(out / checkpoint.CONFIG, to_yaml(config))
        self.watch = Watch(config, out, self.iteration, self.precision)
        self.skipped = 0  # steps in a row

    def run(self) -> None:
        """All iterations that are left; a checkpoint at the end."""
        every = self.config.watch.checkpoint_every
        self.watch.say(self._about())
        try:
            while self.iteration < self.config.schedule.iterations:
                self.step()
                self.iteration += 1
                last = self.iteration == self.config.schedule.iterations
                if last or (every and self.iteration % every == 0):
                    self.save()
                self.writer.poll()
                self.watch.evaluate(self.iteration, self.model)
            self.writer.finish()
        finally:
            self.writer.close()
            self.watch.close()

    def _about(self) -> str:
        """What runs here, and where."""
        if self.iteration == self.config.schedule.iterations:
            return f"{self.out}: all {self.iteration} iterations (schedule.iterations) are done"
        parameters = sum(p.numel() for p in self.model.student["backbone"].parameters())
        return (
            f"{self.out}: iterations {self.iteration} to {self.config.schedule.iterations} of "
            f"{self.config.schedule.batch} images, {self.loader.samples_per_epoch} in all; a "
            f"backbone of {parameters / 1e6:.1f} M parameters in {self.precision.name} on "
            f"{distributed.world_size()} x {self.device.type}"
        )

    def step(self) -> None:
        """One iteration: `accumulate` batches, one update of student and teacher."""
        now, rates, config = self.iteration, self.rates, self.config
        set_rates(
            self.optimizer.param_groups,
            rates.lr[now],
            rates.last_layer_lr[now],
            rates.weight_decay[now],
        )
        batches, bad = config.parallel.accumulate, None
        for number in range(batches):
            crops = next(self.loader)
            with self.spread.accumulating(last=number == batches - 1), self.precision.autocast():
                losses = self.spread(
                    drawn_batch(config, crops, (now, self._number(number)), self.device),
                    float(rates.teacher_temperature[now]),
                )
                # Also of a step that will be skipped: a sharded model holds what it has not summed.
                self.scaler.scale(losses.total / batches).backward()
                if bad is None and not self._finite(losses.total.detach()):  # waits for a GPU
                    bad = crops, number
            if bad is None:
                self.watch.add(losses.values, losses.total.detach())
        if bad is not None:
            self._skip(*bad, "loss")
            return
        self.scaler.unscale_(self.optimizer)
        norms = clip_gradients(self.model.student, config.optimizer.clip)
        norms = {name: distributed.whole(norm) for name, norm in norms.items()}
        if self._finite(torch.stack(list(norms.values()))):
            self.scaler.step(self.optimizer)
            self.skipped = 0
        elif not self.scaler.is_enabled() or self.scaler.get_scale() < LEAST_SCALE:
            self._skip(crops, number, "gradients")  # else fp16 has overflowed: its scale falls
        self.scaler.update()
        self.optimizer.zero_grad()
        self.model.update_teacher(float(rates.momentum[now]))
        self.watch.iteration(now, norms, self.rates, self.loader, self.scaler)

    @staticmethod
    def _number(number: int) -> int:
        """Of a rank's batch among all batches of the step."""
        return number * distributed.world_size() + distributed.rank()

    def _finite(self, values: torch.Tensor) -> bool:
        """On all ranks."""
        bad = (~torch.isfinite(values)).any().float()
        return bool(distributed.all_reduce_max(bad) == 0)

    def _skip(self, crops: Crops, number: int, what: str) -> None:
        """Leaves a step out, keeps what it was made of, and stops when that goes on and on.

        `number` of the step's batches, with the iteration and the seed, draws the same masks again.
        """
        self.optimizer.zero_grad()
        self.skipped += 1
        scale, place = self.scaler.get_scale(), self._number(number)
        left_out = skipped.Skipped(self.iteration, place, what, scale, crops)
        skipped.keep(self.out, left_out, self.model if self.skipped == 1 else None)
        self.watch.skip(self.iteration, what)
        if self.skipped >= self.config.optimizer.most_skipped:
            raise UserError(
                f"{self.out}: {what} not finite in {self.skipped} steps in a row; see `pretrain "
                f"replay` with a file of {self.out / skipped.FOLDER}; resume with --set "
                f"schedule.base_lr=… lower, after removing the last of "
                f"{self.out / checkpoint.FOLDER} if it is to begin earlier"
            )

    def _fill_anchors(self, source: Source, stream: StreamConfig) -> None:
        """From crops of another seed."""
        frozen = self.model.frozen
        if frozen is None or not isinstance(frozen["dino_head"], Anchors):
            return
        other = replace(stream, seed=stream.seed + 1)
        ranks = distributed.rank(), distributed.world_size()
        loader = Loader(source, replace(self.config.crops, local_crops=0), other, *ranks)
        crops = (normalise(batch.global_crops, self.device) for batch in loader)
        rng = torch.Generator().manual_seed(other.seed)
        with self.precision.autocast():
            fill_anchors(frozen, crops, rng)

    def _begin(self, begin: Begin) -> tuple[int, dict[str, object] | None]:
        """(iteration, position in the data)."""
        if begin.checkpoint is not None:
            checkpoint.read(begin.checkpoint, self.model)
        if begin.resumed is None:
            return 0, None
        progress = checkpoint.read(begin.resumed, self.model, self.optimizer)
        if progress.iteration > self.config.schedule.iterations:
            raise UserError(
                f"schedule.iterations {self.config.schedule.iterations}: {begin.resumed} has done "
                f"{progress.iteration} already"
            )
        if progress.scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(progress.scaler)
        return progress.iteration, progress.data

    def save(self) -> None:
        progress = Progress(self.iteration, self.loader.state(), self.scaler.state_dict())
        self.writer.save(self.model, self.optimizer, progress)


def images_per_batch(config: Config, ranks: int) -> int:
    """Images of a rank in one forward pass. Errors: UserError when they can't be shared evenly."""
    batch, parts = config.schedule.batch, ranks * config.parallel.accumulate
    if batch % parts:
        raise UserError(
            f"schedule.batch {batch}: must be a multiple of {parts} "
            f"({ranks} ranks, parallel.accumulate {config.parallel.accumulate})"
        )
    return batch // parts


def drawn_batch(
    config: Config, crops: Crops, place: tuple[int, int], device: torch.device
) -> Batch:
    """On the device; draws the masks, and seeds what drop path draws.

    `place`: the iteration, from 0, and the number of the batch among all of the step.
    """
    rng = np.random.default_rng([config.data.seed, *place])
    torch.manual_seed(int(rng.integers(SEEDS)))
    grid = config.crops.global_size // config.model.patch_size
    count = len(crops.global_crops)
    if config.distill is None:
        masks = draw_masks(count, grid, rng, config.masks)
    else:
        masks = hide_nothing(count, grid)
    tensors = (masks.tokens, masks.indices, masks.weights)
    tokens, indices, weights = (t.to(device, non_blocking=True) for t in tensors)
    return Batch(
        normalise(crops.global_crops, device),
        normalise(crops.local_crops, device),
        masks._replace(tokens=tokens, indices=indices, weights=weights),
    )


def model_of(config: Config, device: torch.device) -> StudentTeacher:
    model = StudentTeacher(
        config.model,
        config.objective,
        distributed.ALL_RANKS,
        config.parallel.activation_checkpointing,
        load_teacher(config) if config.distill else None,
    )
    if config.parallel.compile:
        for network in (model.student, model.teacher):
            backbone = network["backbone"]
            assert isinstance(backbone, ViT)
            compile_blocks(backbone)
    return model.to(device).train()


def _spread(
    model: StudentTeacher, config: Config, chosen: precision.Precision
) -> distributed.Spread:
    mode = config.parallel.mode
    if mode == "auto":
        mode = "fsdp" if chosen.device.type == "cuda" else "ddp"
    units: list[distributed.Unit] = []
    for network in (model.student, model.teacher):
        blocks = network["backbone"].get_submodule("blocks").children()
        units += [(module, chosen.dtype) for module in (*blocks, *network.values())]
    if model.frozen is not None:  # in fp32, which autocast rounds where a foreign model allows it
        units += [(module, None) for module in (*blocks_of(model.frozen), *model.frozen.values())]
    return distributed.Spread(model, mode, units)


def _write_whole(path: Path, text: str) -> None:
    """A kill or a full disk leaves the file as it was."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
