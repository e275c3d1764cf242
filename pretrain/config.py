"""What a run is made of: frozen sections, read from YAML, all faults told at once."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from pretrain.crops import CropConfig
from pretrain.errors import UserError
from pretrain.heads import HeadConfig
from pretrain.masking import MaskingConfig
from pretrain.ranges import Count, CountOrZero, NotNegative, Positive, Share, ShareBelowOne
from pretrain.schedules import ScheduleConfig
from pretrain.student_teacher import ObjectiveConfig
from pretrain.vit import ViTConfig

LEAST_BALANCED = 64  # images that Sinkhorn sees together
LEAST_SPREAD = 16  # images among which KoLeo looks for the nearest


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and what is done to its gradients."""

    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.999)
    layer_decay: Positive = 1.0  # of the learning rate, by block from the last to the first
    patch_embed_lr: NotNegative = 0.2  # times the others'
    clip: Positive = 3.0  # norm of the gradients of each network
    most_skipped: Count = 20  # steps in a row whose loss or gradients are not finite


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they are drawn; see `stream.StreamConfig`."""

    shards: str = ""  # a folder or s3://bucket/prefix; --shards says it
    seed: CountOrZero = 0
    window: Count = 1 << 17  # samples that are shuffled together
    workers: CountOrZero = 4  # processes a rank
    max_bad_share: Share = 0.01


@dataclass(frozen=True)
class DistillConfig:
    """The frozen teacher of a smaller student; --teacher and --teacher-weights say both."""

    teacher: str  # the folder of a run, or a timm model's name
    weights: str = "hub"  # of a timm model: hub, or a file in timm's or the official names
    iteration: CountOrZero | None = None  # of a run; `pretrain distill` says which it took


@dataclass(frozen=True)
class ParallelConfig:
    """How a step is spread over ranks and over time.

    `precision: auto` is bf16 where the GPU has it, fp16 with loss scaling on older ones (V100); on
    a CPU bf16 where it has AMX or AVX-512 BF16, else fp32. `mode: auto` is fsdp with several GPUs,
    ddp with several CPU processes.
    """

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    mode: Literal["auto", "ddp", "fsdp"] = "auto"
    accumulate: Count = 1  # batches of a rank that make up one step
    activation_checkpointing: bool = False
    compile: bool = False


@dataclass(frozen=True)
class WatchConfig:
    """What is written down, and how often, in iterations. 0: never."""

    log_every: CountOrZero = 10
    checkpoint_every: CountOrZero = 1000
    keep: Count = 3  # checkpoints
    evaluate_every: CountOrZero = 0
    evaluate_on: str = ""  # a folder with a folder a class


class Misfit(NamedTuple):
    """Settings that are right alone and wrong together."""

    settings: tuple[str, ...]  # dotted
    fault: str


class Misfits(ValueError):
    """All that are in a config."""

    def __init__(self, found: Sequence[Misfit]) -> None:
        super().__init__("\n".join(one.fault for one in found))
        self.found = found


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
        found = list(_misfits(self))
        if found:
            raise Misfits(found)
        return self

    def warnings(self, ranks: int = 1) -> list[str]:
        """Settings that are known to collapse or to learn nothing, on so many ranks."""
        found = []
        together = self.schedule.batch // self.parallel.accumulate
        if together < LEAST_BALANCED:
            found.append(
                f"schedule.batch {self.schedule.batch}: DINOv2 was trained with 2,048 and more; "
                f"of {together} at a time (batch / parallel.accumulate) Sinkhorn has too few to "
                "balance, features may collapse"
            )
        alone = together // ranks
        if self.objective.koleo_weight and alone < LEAST_SPREAD:
            found.append(
                f"schedule.batch {self.schedule.batch}: KoLeo spreads the {alone} images that a "
                f"rank has at a time; below {LEAST_SPREAD} it says little: use a larger batch, "
                "fewer ranks or less parallel.accumulate"
            )
        if self.schedule.final_teacher_temperature > 0.09:
            found.append("schedule.final_teacher_temperature above 0.09 is known to collapse")
        if self.objective.centering == "softmax" and self.objective.center_momentum > 0.99:
            found.append("objective.center_momentum above 0.99 lags too far behind the teacher")
        return found


def _misfits(config: Config) -> Iterator[Misfit]:
    model, crops, masks = config.model, config.crops, config.masks
    schedule, watch = config.schedule, config.watch
    patch = model.patch_size
    for name in ("global_size", "local_size"):
        size = getattr(crops, name)
        if size % patch:
            near = sorted({max(size // patch, 1) * patch, (size // patch + 1) * patch})
            say = " or ".join(map(str, near))
            fault = f"crops.{name} {size}: no multiple of model.patch_size; say {say}"
            yield Misfit((f"crops.{name}", "model.patch_size"), fault)
    for name in ("global_scale", "local_scale"):
        low, high = getattr(crops, name)
        if not 0 < low <= high <= 1:
            fault = f"crops.{name} {low}, {high}: must be 0 < low <= high <= 1"
            yield Misfit((f"crops.{name}",), fault)
    if model.width % model.heads:
        fault = f"model.heads {model.heads}: must divide model.width"
        yield Misfit(("model.heads", "model.width"), fault)
    if model.image_size < patch:
        fault = f"model.image_size {model.image_size}: must be model.patch_size ({patch}) or more"
        yield Misfit(("model.image_size", "model.patch_size"), fault)
    if config.distill is not None and model.drop_path > 0:
        fault = f"model.drop_path {model.drop_path}: a distilled student drops none; say 0"
        yield Misfit(("distill", "model.drop_path"), fault)
    if masks.least_ratio > masks.most_ratio:
        fault = f"masks.least_ratio {masks.least_ratio}: more than masks.most_ratio"
        yield Misfit(("masks.least_ratio", "masks.most_ratio"), fault)
    if schedule.warmup > schedule.iterations:
        fault = f"schedule.warmup {schedule.warmup}: more than schedule.iterations"
        yield Misfit(("schedule.warmup", "schedule.iterations"), fault)
    if watch.evaluate_every and not watch.evaluate_on:
        fault = "watch.evaluate_on: name a labelled folder, or set evaluate_every to 0"
        yield Misfit(("watch.evaluate_every", "watch.evaluate_on"), fault)


def shipped() -> list[str]:
    """Names of the configs that come with the package."""
    files = resources.files("pretrain").joinpath("configs").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files)


def load(
    name: str,
    settings: Sequence[str] = (),
    below: Mapping[str, Any] | None = None,
    flag: str = "--config",
) -> Config:
    """A shipped config by name, or a YAML file; `settings` are `a.b=value`, and win.

    `below`: the config of the run that this one begins from, whose values stand where neither says
    anything. Errors: UserError, with all faults.
    """
    # Else one setting of the objective would replace both heads of the default.
    default = {"objective": dataclasses.asdict(Config().objective)}
    return with_settings(_merged(_merged(default, below or {}), _read(name, flag)), settings, name)


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
        lines += _hidden_misfits(given, [one["loc"] for one in error.errors()])
        raise UserError(f"{where}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _hidden_misfits(given: Mapping[str, Any], wrong: Sequence[tuple[Any, ...]]) -> list[str]:
    """Faults that pydantic has not come to, since settings are `wrong` by themselves.

    They are looked for with defaults in the place of those; what concerns these is left out.
    """
    try:
        Config.model_validate(_without(given, wrong))
    except ValidationError as error:
        causes = [one["ctx"]["error"] for one in error.errors() if one["type"] == "value_error"]
        found = [one for cause in causes if isinstance(cause, Misfits) for one in cause.found]
        paths = {tuple(map(str, loc)) for loc in wrong}
        return [
            one.fault
            for one in found
            if not any(tuple(s.split("."))[: len(p)] == p for s in one.settings for p in paths)
        ]
    return []


def _without(given: Mapping[str, Any], wrong: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """The mapping less the settings at the paths, or the sections that lack one."""
    kept = {}
    for key, value in given.items():
        below = [loc[1:] for loc in wrong if loc and loc[0] == key]
        if () in below:
            continue
        if below and not isinstance(value, Mapping):  # an element of a list
            continue
        if any(len(loc) == 1 and loc[0] not in value for loc in below):
            continue
        kept[key] = _without(value, below) if below else value
    return kept


def to_yaml(config: Config) -> str:
    """Every value, so that a run says all that it was made with."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read(name: str, flag: str) -> dict[str, Any]:
    if name in shipped():
        text = resources.files("pretrain").joinpath(f"configs/{name}.yaml").read_text()
    elif name.endswith((".yaml", ".yml")) or Path(name).exists():
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(f"{flag} {name}: can't be read: {why}") from None
    else:
        near = get_close_matches(name, shipped(), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{flag} {name}: no YAML file, nor one of {', '.join(shipped())}{hint}")
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
        return str(one["ctx"]["error"])
    if one["type"] == "dataclass_type":
        return f"{dotted} {one['input']!r:.60}: wanted settings such as `{dotted}: {{…}}`"
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
