"""The recipe: the YAML a user writes, as frozen models, with all faults reported at once."""

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from curation.recipe_faults import faults, short
from curation.recipe_intake import Fetch, Safety
from curation.recipe_modes import ClusterDraw, Hierarchical, Mode, Model, Sample

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class RecipeError(Exception):
    """One or more faults of a recipe; the message lists them all, a line each."""


def _name(value: str) -> str:
    if not NAME.fullmatch(value):
        raise ValueError("must be letters, digits, '.', '_' and '-', at most 64")
    return value


def _uri(value: str) -> str:
    scheme, found, _ = value.partition("://")
    if (found and scheme not in ("s3", "file")) or "\0" in value or not value.strip():
        raise ValueError("must be a local path or s3://bucket/prefix")
    return value


Name = Annotated[str, AfterValidator(_name)]
Uri = Annotated[str, AfterValidator(_uri)]


class Source(Model):
    """Images at one place. Brace ranges (`{000..123}.tar`) are allowed in the uri.

    `format: urls` takes text, CSV and Parquet files there for lists of URLs, and fetches those.
    `images` is how many are expected there: what `curate plan` counts on instead of listing them.
    """

    uri: Uri
    format: Literal["folder", "webdataset", "parquet", "urls"] | None = None
    images: int | None = Field(None, ge=1)


class CuratedSource(Source):
    """A set of images that show what is wanted, and how the pool is searched with it."""

    retrieve: tuple[Mode, ...] = Field((Mode(as_is=True), Mode(sample=Sample())), min_length=1)

    @field_validator("retrieve")
    @classmethod
    def _each_once(cls, modes: tuple[Mode, ...]) -> tuple[Mode, ...]:
        names = [name for mode in modes for name in mode.model_fields_set]
        if len(names) != len(set(names)):
            raise ValueError("names the same mode twice")
        return modes

    @property
    def as_is(self) -> bool:
        return any(mode.as_is for mode in self.retrieve)

    @property
    def sample(self) -> Sample | None:
        return next((mode.sample for mode in self.retrieve if mode.sample), None)

    @property
    def cluster(self) -> ClusterDraw | None:
        return next((mode.cluster for mode in self.retrieve if mode.cluster), None)

    @property
    def hierarchical(self) -> Hierarchical | None:
        return next((mode.hierarchical for mode in self.retrieve if mode.hierarchical), None)


class Sources(Model):
    """`pool` is searched, `curated` says what for, and nothing near `holdout` may stay."""

    pool: tuple[Source, ...] = Field(min_length=1)
    curated: dict[Name, CuratedSource] = Field(min_length=1)
    holdout: dict[Name, Source] = Field(default_factory=dict)


class Images(Model):
    """What is accepted as an image; everything else is rejected with its reason."""

    min_side: int = Field(32, ge=1)
    max_pixels: int = Field(100_000_000, ge=1)
    max_bytes: int = Field(100_000_000, ge=1)
    max_aspect: float = Field(10.0, ge=1)


class Encoder(Model):
    """A timm ViT. `weights` is `hub`, a local file or s3://; `lvd_demo` is built in.

    `fp16` is for GPUs without bf16 (V100, T4). `compile`, on GPUs: the model's steps are put
    together into kernels of its own, which every worker makes at its start. `decoder: nvjpeg`: an
    NVIDIA GPU decodes and resizes the JPEGs as well, faster than `pillow` in a worker's threads;
    vectors differ a little (mean cosine .9997).
    """

    model: str = "vit_base_patch16_224.augreg_in21k"
    weights: str = "hub"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch: int = Field(16, ge=1)
    compile: bool = False
    decoder: Literal["pillow", "nvjpeg"] = "pillow"


class CopyDescriptor(Model):
    """An SSCD TorchScript file by uri; left out: the small one that comes with LVD."""

    weights: str = "builtin"


class Dedup(Model):
    """Near-duplicates (DINOv2, app. A.3). Thresholds left out are the copy descriptor's own."""

    k: int = Field(64, ge=1, le=1024)
    min_cosine: float | None = Field(None, gt=-1, le=1)
    holdout_min_cosine: float | None = Field(None, gt=-1, le=1)
    max_component: int = Field(200, ge=2)


class Cluster(Model):
    """Spherical k-means of the kept pool, trained on a sample of it (0: on all of it).

    `start: k-means++` finds small groups that random images miss; take it up to k = 2000.
    `resample: 10`, for the mode `hierarchical`, fits ten times more on the rows nearest to each
    centroid (arXiv 2405.15613): centroids spread over what there is. It takes six times as long.
    """

    k: int = Field(100_000, ge=1)
    iterations: int = Field(20, ge=1, le=1000)
    sample_per_centroid: int = Field(256, ge=0)
    start: Literal["random", "k-means++"] = "random"
    resample: int = Field(0, ge=0, le=100)


class Search(Model):
    """How neighbours are found. Up to `exact_below` base images every pair is compared.

    Above: exactly within the cells where they are likely (`cells`), or by faiss's IVF-PQ with exact
    re-scoring, as DINOv2 did it (`ivfpq`). Copies of queries on their way take `spill_bytes`.
    """

    method: Literal["cells", "ivfpq"] = "cells"
    exact_below: int = Field(50_000, ge=0)
    target_recall: float = Field(0.99, gt=0, le=1)
    spill_bytes: int = Field(200_000_000_000, ge=1)


class Shards(Model):
    """The WebDataset that is written."""

    images_per_shard: int = Field(10_000, ge=1)


class Failures(Model):
    """The budget: a run that rejects more than this share (and more than `min_images`) stops."""

    max_share: float = Field(0.5, ge=0, le=1)
    min_images: int = Field(1000, ge=0)


class Resources(Model):
    """Workers (all cores or GPUs when left out) and the images of a part: what a kill can cost.

    Beyond some ten million images take 10,000 a part, to keep the list of parts short.
    """

    workers: int | None = Field(None, ge=1)
    part_images: int = Field(256, ge=1, le=1_000_000)


class Recipe(Model):
    """The whole recipe; `curate init` writes a commented one."""

    name: Name
    output: Uri
    seed: int = Field(0, ge=0, lt=2**63)
    sources: Sources
    images: Images = Images()
    fetch: Fetch = Fetch()
    encoder: Encoder = Encoder()
    copy_descriptor: CopyDescriptor = CopyDescriptor()
    safety: Safety = Safety()
    dedup: Dedup = Dedup()
    cluster: Cluster = Field(Cluster(), validate_default=True)
    search: Search = Search()
    shards: Shards = Shards()
    failures: Failures = Failures()
    resources: Resources = Resources()

    @field_validator("sources")
    @classmethod
    def _apart_from_output(cls, sources: Sources, info: ValidationInfo) -> Sources:
        """A source within the output would be deleted by it; the output within one, ingested."""
        output = location(info.data.get("output", "\0"))
        for source in [*sources.pool, *sources.curated.values(), *sources.holdout.values()]:
            place = location(source.uri)
            if output.startswith(place) or place.startswith(output):
                raise PydanticCustomError(
                    "conflict",
                    "{source} and the output {output} must lie apart",
                    {"source": source.uri, "output": info.data["output"]},
                )
        return sources

    @field_validator("safety")
    @classmethod
    def _pixels_where_they_are_needed(cls, safety: Safety, info: ValidationInfo) -> Safety:
        """The classifier and hashes take Pillow's pixels, which nvJPEG doesn't bring back."""
        needing = [name for name in ("filter", "phash") if getattr(safety, name) is not None]
        if needing and "encoder" in info.data and info.data["encoder"].decoder == "nvjpeg":
            raise PydanticCustomError(
                "conflict",
                "{names} can't be had with encoder.decoder: nvjpeg; write `pillow` there, or leave"
                " {them} out",
                {"names": " and ".join(needing), "them": "them" if needing[1:] else "it"},
            )
        return safety

    @field_validator("cluster")
    @classmethod
    def _more_than_the_levels_above(cls, cluster: Cluster, info: ValidationInfo) -> Cluster:
        """Told once, for the `levels` that ask for the most clusters below them."""
        sets = info.data["sources"].curated if "sources" in info.data else {}
        asking = [
            (mode.hierarchical.least_clusters, name, number, mode.hierarchical.levels)
            for name, source in sets.items()
            for number, mode in enumerate(source.retrieve)
            if mode.hierarchical and mode.hierarchical.least_clusters > cluster.k
        ]
        if not asking:
            return cluster
        least, name, number, levels = max(asking, key=lambda one: one[0])
        place = f"sources.curated.{name}.retrieve.{number}.hierarchical.levels"
        given = levels if isinstance(levels, int) else list(levels)
        raise PydanticCustomError(
            "conflict",
            "k must be at least {least} for {place}: {levels}, got {k}",
            {"least": least, "place": place, "levels": short(given), "k": cluster.k},
        )


def location(uri: str) -> str:
    """A uri in the form in which one begins with another if it lies inside it."""
    if uri.startswith("s3://") or uri == "\0":
        return uri.rstrip("/") + "/"
    return os.path.realpath(os.path.expanduser(uri.removeprefix("file://"))).rstrip("/") + "/"


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where plain YAML silently keeps the last."""


def _mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if isinstance(key, list | dict):
            raise RecipeError(f"line {line}: a key must be text, not {short(key)}")
        if key in seen:
            raise RecipeError(f"line {line}: '{key}' is given twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:map", _mapping)


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """A recipe file (`-`: the standard input) with `a.b=value` overrides.

    Raises RecipeError that lists every fault.
    """
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file; `curate init` writes a starter recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: can't be read as a UTF-8 text file: {error}") from None
    return parse(text, str(path), overrides or [])


def parse(text: str, where: str, overrides: list[str]) -> Recipe:
    """A recipe from YAML text; `where` names it in errors."""
    try:
        data = yaml.load(text, _UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}," if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        problem = " ".join(problem.split())
        raise RecipeError(f"{where}:{line} not valid YAML: {problem}") from None
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of name, output, sources, …")
    for override in overrides:
        _override(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = faults(error, Recipe)
        count = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
        raise RecipeError("\n".join([f"{where}: {count}", *(f"  {x}" for x in lines)])) from None


def _override(data: dict[str, Any], text: str) -> None:
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {text}: write it as path=value, as in dedup.min_cosine=0.7")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {text}: the value is not valid YAML") from None
    at: Any = data
    *parents, last = path.split(".")
    try:
        for key in parents:
            at = at[int(key)] if isinstance(at, list) else at.setdefault(key, {})
        at[int(last) if isinstance(at, list) else last] = parsed
    except (ValueError, IndexError, AttributeError, TypeError):
        raise RecipeError(f"--set {text}: there is no place '{path}' in the recipe") from None


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
