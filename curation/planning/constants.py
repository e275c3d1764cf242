"""What a machine does in a second: constants of the planner, each with where it comes from.

`constants.yaml` ships with LVD; `curate calibrate` writes the same form for the machine at hand,
and what it has measured replaces what was shipped.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from curation.recipe import RecipeError
from curation.recipe_faults import near

SHIPPED = "constants.yaml"
PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Gpu:
    """A node with GPUs of one kind: what one GPU computes in a forward pass, and the node's rest.

    `tflops` by precision; one that is missing the GPU can't do.
    """

    name: str
    tflops: Mapping[str, float]
    gpus: int
    cores: int
    node_bytes: float
    network_bytes_per_s: float
    node_hour_usd: float
    source: str


@dataclass(frozen=True)
class Constants:
    """Values by name, the source of each, and the nodes with GPUs that are known."""

    values: Mapping[str, float]
    sources: Mapping[str, str]
    gpus: Mapping[str, Gpu]

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def updated(self, values: Mapping[str, float]) -> "Constants":
        """With these values in the place of others."""
        return replace(self, values={**self.values, **values})

    def gpu(self, name: str) -> Gpu:
        """Raises RecipeError for a GPU that nothing is known of."""
        if name not in self.gpus:
            known = ", ".join(sorted(self.gpus))
            hint = near(name, self.gpus)
            raise RecipeError(
                f"--gpu {name}: not known{hint} (known: {known}; a file for --constants may add it)"
            )
        return self.gpus[name]


def shipped() -> Constants:
    """Those that come with LVD."""
    text = resources.files("curation.planning").joinpath(SHIPPED).read_text(encoding="utf-8")
    return _read(text, SHIPPED, Constants({}, {}, {}))


def load(path: str | None) -> Constants:
    """The shipped constants, and over them those of a file. Raises RecipeError that names it."""
    base = shipped()
    if path is None:
        return base
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--constants {path}: can't be read: {error}") from None
    return _read(text, path, base)


def dump(measured: Mapping[str, float], source: str) -> str:
    """Constants as a file for `--constants`."""
    rows = {name: {"value": float(f"{v:.4g}"), "source": source} for name, v in measured.items()}
    return yaml.safe_dump({"constants": rows}, sort_keys=False, allow_unicode=True, width=100)


def _read(text: str, where: str, base: Constants) -> Constants:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or not set(data) <= {"constants", "gpus"}:
        raise RecipeError(f"{where}: must be a mapping of constants and gpus")
    values, sources, gpus = dict(base.values), dict(base.sources), dict(base.gpus)
    for name, entry in (data.get("constants") or {}).items():
        if base.values and name not in base.values:
            hint = near(str(name), base.values)
            raise RecipeError(f"{where}: constants.{name}: no such constant{hint}")
        if not (isinstance(entry, dict) and "source" in entry and _is_number(entry.get("value"))):
            raise RecipeError(f"{where}: constants.{name}: must be {{value: NUMBER, source: TEXT}}")
        values[name], sources[name] = float(entry["value"]), str(entry["source"])
    for name, entry in (data.get("gpus") or {}).items():
        try:
            gpus[name] = Gpu(name, **entry)
        except TypeError:
            fields = ", ".join(field for field in Gpu.__dataclass_fields__ if field != "name")
            raise RecipeError(f"{where}: gpus.{name}: must be a mapping of {fields}") from None
        if not set(gpus[name].tflops) <= set(PRECISIONS):
            raise RecipeError(f"{where}: gpus.{name}.tflops: by {', '.join(PRECISIONS)}")
    return Constants(values, sources, gpus)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
