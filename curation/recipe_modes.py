"""The ways in which a curated set is used: the entries of its `retrieve` list."""

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from curation.recipe_faults import near

MODES = ("as_is", "sample", "cluster", "hierarchical")
MOST_LEVELS = 10
BRANCHES = 10  # clusters below one of the next level, where `levels` is a number


class Model(BaseModel):
    """A part of a recipe: frozen, and without keys that nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = (
            info.field_name == "as_is" or cls.model_fields[str(info.field_name)].annotation is bool
        )
        if isinstance(value, bool) and not wanted:
            raise ValueError("true and false (and yes, no, on, off) have no meaning here")
        return value

    @model_validator(mode="before")
    @classmethod
    def _empty_is_left_out(cls, data: Any) -> Any:
        """`holdout:` with nothing below it, as when its lines are commented out."""
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data


class Sample(Model):
    """The k nearest pool images of every image of the set (DINOv2, app. A.4)."""

    k: int = Field(4, ge=1, le=1000)
    collisions: Literal["merge", "backfill"] = "merge"


class ClusterDraw(Model):
    """Random draws from each cluster that holds at least `min_queries` images of the set.

    `expected_clusters` is how many are thought to hold so many, for `curate plan` alone: a run
    counts them.
    """

    per_cluster: int = Field(10_000, ge=1)
    min_queries: int = Field(4, ge=1)
    cap: int = Field(1_000_000, ge=1)
    expected_clusters: int | None = Field(None, ge=0)


def _levels(value: Any) -> Any:
    if type(value) is int:
        fine = 1 <= value <= MOST_LEVELS
    else:
        fine = isinstance(value, list | tuple) and all(type(count) is int for count in value)
        fine = fine and 1 <= len(value) < MOST_LEVELS and value[-1] >= 2
        fine = fine and all(above < below for below, above in pairwise(value))
    if not fine:
        raise ValueError(
            f"must be a number of levels from 1 to {MOST_LEVELS}, or the cluster counts of the"
            " levels above the first, falling to 2 or more, as in [1000, 100]"
        )
    return value


class Hierarchical(Model):
    """Draws from the whole kept pool, balanced over its concepts, whatever the set's images are.

    Clusters of clusters share `target_size` images from the top down, each level as evenly as the
    sizes allow (Vo et al., arXiv 2405.15613). `levels` is how many levels of clusters there are:
    the first has `cluster.k`, each further one a tenth of the clusters of the one below, at least
    2. Or it lists the cluster counts of the levels above the first. `cluster.resample: 10` spreads
    the first over the concepts as the paper does; the levels above always are.
    """

    levels: Annotated[int | tuple[int, ...], BeforeValidator(_levels)] = 3
    target_size: int = Field(1_000_000, ge=1)

    def counts(self, k: int) -> tuple[int, ...]:
        """The cluster counts of the levels above the first, which has `k`."""
        if not isinstance(self.levels, int):
            return self.levels
        counts = [k]
        for _ in range(self.levels - 1):
            counts.append(max(2, counts[-1] // BRANCHES))
        return tuple(counts[1:])

    @property
    def least_clusters(self) -> int:
        """The smallest `cluster.k` for which every level has fewer clusters than the one below."""
        if not isinstance(self.levels, int):
            return self.levels[0] + 1
        return 3 * BRANCHES ** (self.levels - 2) if self.levels > 1 else 1


class Mode(Model):
    """One entry of a set's `retrieve` list: exactly one of these."""

    as_is: Literal[True] | None = None
    sample: Sample | None = None
    cluster: ClusterDraw | None = None
    hierarchical: Hierarchical | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in MODES:
                raise ValueError(
                    "must be as_is, {sample: {k: 4}}, {cluster: {per_cluster: 10000}} or"
                    " {hierarchical: {target_size: 1000000}}" + near(value, MODES)
                )
            return {value: True if value == "as_is" else {}}
        if isinstance(value, dict) and len(value) != 1:
            raise ValueError(f"must hold exactly one of {', '.join(MODES)}")
        if isinstance(value, dict):  # `- sample:` alone means its defaults
            name, given = next(iter(value.items()))
            return {name: (True if name == "as_is" else {}) if given is None else given}
        return value

    @model_serializer
    def _only_what_is_set(self) -> dict[str, Any]:
        """As it must be written: a resolved recipe can be read again."""
        return {name: getattr(self, name) for name in MODES if getattr(self, name) is not None}
