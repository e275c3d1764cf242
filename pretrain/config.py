"""What a run is made of: frozen sections, read from YAML, all faults told at once."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from pretrain.crops import CropConfig
from pretrain.errors import UserError
from pretrain.heads import HeadConfig
from pretrain.masking import MaskingConfig
from pretrain.schedules import ScheduleConfig
from pretrain.student_teacher import ObjectiveConfig
from pretrain.vit import ViTConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and what is done to its gradients."""

    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 1.0  # of the learning rate, by block from the last to the first
    patch_embed_lr: float = 0.2  # times the others'
    clip: float = 3.0  # norm of the gradients of each network
    most_skipped: int = 20  # steps in a row whose loss or gradients are not finite


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they are drawn; see `stream.StreamConfig`."""

    shards: str = ""  # a folder or s3://bucket/prefix; --shards says it
    seed: int = 0
    window: int = 1 << 17  # samples that are shuffled together
    workers: int = 4  # processes a rank
    max_bad_share: float = 0.01


@dataclass(frozen=True)
class DistillConfig:
    """The frozen teacher of a smaller student; --teacher and --teacher-weights say both."""

    teacher: str  # the folder of a run, or a timm model's name
    weights: str = "hub"  # of a timm model: hub, or a file in timm's or the official names
    iteration: int | None = None  # of a run; `pretrain distill` says which it took


@dataclass(frozen=True)
class ParallelConfig:
    """How a step is spread over ranks and over time.

    `precision: auto` is bf16 where the GPU has it, fp16 with loss scaling on older ones (V100), and
    fp32 on a CPU. `mode: auto` is fsdp with several GPUs, ddp with several CPU processes.
    """

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    mode: Literal["auto", "ddp", "fsdp"] = "auto"
    accumulate: int = 1  # batches of a rank that make up one step
    activation_checkpointing: bool = False
    compile: bool = False


@dataclass(frozen=True)
class WatchConfig:
    """What is written down, and how often, in iterations. 0: never."""

    log_every: int = 10
    checkpoint_every: int = 1000
    keep: int = 3  # checkpoints
    evaluate_every: int = 0
    evaluate_on: str = ""  # a folder with a folder a class


class Config(BaseModel):
    """One run. The defaults are DINOv2's long recipe with ViT-S/14."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ViTConfig = ViTConfig(drop_path=0.3)
    objective: ObjectiveConfig = ObjectiveConfig(HeadConfig(bottleneck=384), HeadConfig())
    crops: CropConfig = CropConfig()
    masks: MaskingConfig = MaskingConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    distill: DistillConfig | None = None  # None: the student's own average teaches it
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    watch: WatchConfig = WatchConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        patch, faults = self.model.patch_size, []
        for name in ("global_size", "local_size"):
            size = getattr(self.crops, name)
            if size % patch:
                near = f"{size // patch * patch} or {(size // patch + 1) * patch}"
                faults.append(f"crops.{name} {size}: no multiple of model.patch_size; say {near}")
        if self.model.width % self.model.heads:
            faults.append(f"model.heads {self.model.heads}: must divide model.width")
        if self.watch.evaluate_every and not self.watch.evaluate_on:
            faults.append("watch.evaluate_on: name a labelled folder, or set evaluate_every to 0")
        for name in ("iterations", "batch"):
            if getattr(self.schedule, name) < 1:
                faults.append(f"schedule.{name} {getattr(self.schedule, name)}: must be 1 or more")
        if self.schedule.warmup > self.schedule.iterations:
            faults.append(f"schedule.warmup {self.schedule.warmup}: more than schedule.iterations")
        if self.parallel.accumulate < 1:
            faults.append(f"parallel.accumulate {self.parallel.accumulate}: must be 1 or more")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def warnings(self) -> list[str]:
        """Settings that are known to collapse or to learn nothing."""
        found = []
        if self.schedule.batch < 64:
            found.append(
                f"schedule.batch {self.schedule.batch}: DINOv2 was trained with 2,048 and more; "
                "below 64 Sinkhorn and KoLeo have too few images to balance, features may collapse"
            )
        if self.schedule.final_teacher_temperature > 0.09:
            found.append("schedule.final_teacher_temperature above 0.09 is known to collapse")
        if self.objective.centering == "softmax" and self.objective.center_momentum > 0.99:
            found.append("objective.center_momentum above 0.99 lags too far behind the teacher")
        return found


def shipped() -> list[str]:
    """Names of the configs that come with the package."""
    files = resources.files("pretrain").joinpath("configs").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files)


def load(name: str, settings: Sequence[str] = (), below: Mapping[str, Any] | None = None) -> Config:
    """A shipped config by name, or a YAML file; `settings` are `a.b=value`, and win.

    `below`: the config of the run that this one begins from, whose values stand where neither says
    anything. Errors: UserError, with all faults.
    """
    return with_settings(_merged(below or {}, _read(name)), settings, name)


def with_settings(given: Mapping[str, Any], settings: Sequence[str], where: str) -> Config:
    """The config of a mapping and `a.b=value` settings. Errors: UserError, with all faults."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise UserError(f"--set {setting}: wanted a.b=value")
        given = _merged(given, _nested(path.split("."), _yaml(text, f"--set {setting}")))
    return parse(given, where)


def parse(given: Mapping[str, Any], where: str) -> Config:
    """The config of a mapping. Errors: UserError, with all faults."""
    try:
        return Config.model_validate(given)
    except ValidationError as error:
        lines = [line for one in error.errors() for line in _fault(one).split("\n")]
        raise UserError(f"{where}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def to_yaml(config: Config) -> str:
    """Every value, so that a run says all that it was made with."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read(name: str) -> dict[str, Any]:
    if name in shipped():
        text = resources.files("pretrain").joinpath(f"configs/{name}.yaml").read_text()
    elif name.endswith((".yaml", ".yml")) or Path(name).exists():
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--config {name}: can't be read: {error}") from None
    else:
        near = get_close_matches(name, shipped(), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--config {name}: no YAML file, nor one of {', '.join(shipped())}{hint}")
    found = _yaml(text, name) or {}
    if not isinstance(found, dict):
        raise UserError(f"{name}: wanted sections such as `model:`, found {found!r:.60}")
    return found


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    return dict(value)


def _merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`, section by section."""
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _fault(one: Any) -> str:
    """Dotted path, value, and what would be right."""
    path = [str(step) for step in one["loc"]]
    dotted = ".".join(path)
    if one["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        near = get_close_matches(path[-1], _keys(path[:-1]), 1)
        return f"{dotted}: no such setting" + (f"; did you mean {near[0]}?" if near else "")
    if one["type"] == "value_error":
        text = str(one["ctx"]["error"])
        return f"{dotted}.{text}" if dotted else text
    if one["type"] == "missing":
        return f"{dotted}: is missing"
    return f"{dotted} {one['input']!r}: {one['msg'][0].lower()}{one['msg'][1:]}"


def _keys(path: Sequence[str]) -> list[str]:
    """The settings of the section at a path."""
    kind: Any = Config
    for step in path:
        hints = get_type_hints(kind)
        if step not in hints:
            return []
        options = [k for k in getattr(hints[step], "__args__", ()) if dataclasses.is_dataclass(k)]
        kind = options[0] if options else hints[step]
    return list(get_type_hints(kind))
