"""The pipeline on one page: what each stage is given, in order. Read this first.

A stage runs when its fingerprint is new: the hash of its config and of the stages it reads. One
that is done is passed over, one that was killed goes on with its finished parts.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from curation.images.decode import Limits
from curation.images.encoders import DEMO_MODEL, builtin_digest, copy_thresholds
from curation.images.faces import HAAR, FacesConfig
from curation.images.safety import FilterConfig, packaged
from curation.recipe import Recipe, RecipeError, Source, dump
from curation.recipe_modes import ClusterDraw
from curation.runtime.events import Events
from curation.runtime.executor import Executor, one_thread
from curation.runtime.manifest import (
    StageReport,
    completed,
    fingerprint,
    forget,
    read_report,
    restart,
)
from curation.runtime.store import Store, StoreError, open_store, split_uri
from curation.schema import RECIPE_FILE, VERSIONS
from curation.stages import (
    cluster,
    cluster_tables,
    dedup,
    embed,
    embed_worker,
    fetch,
    ingest,
    lineage,
    modes,
    report,
    retrieve,
    shards,
)
from curation.stages.neighbour_plan import SearchConfig
from curation.stages.tables import Embedded
from curation.web.fetcher import FetchConfig

STAGES = ("ingest", "embed", "dedup", "cluster", "retrieve", "shards", "lineage", "report")
SEEDED = 10_000  # clusters: 40 minutes of k-means++ at 384 dimensions on two cores
FOLDERS = (*STAGES, "status")


@dataclass(frozen=True)
class Stage:
    """A stage ready to run: what its fingerprint covers, the stages it reads, and what to call."""

    name: str
    identity: Any
    reads: tuple[str, ...]
    run: Callable[[str, Store, Executor, Events], StageReport]


def plan(recipe: Recipe, surveys: list[ingest.Survey]) -> list[Stage]:
    """The ordered stages of a recipe. Raises StoreError when weights can't be found."""
    r = recipe
    embed_cfg = embed_config(r)
    how = SearchConfig(**r.search.model_dump())
    common: dict[str, Any] = {"embedding": embed_cfg.embedding, "seed": r.seed}
    given = r.dedup.model_dump(exclude_none=True)
    thresholds = copy_thresholds(r.copy_descriptor.weights == "builtin")
    ingest_cfg = ingest_config(r)
    drop_phash = r.safety.phash is not None and r.safety.phash.mode == "drop"
    choices = {**thresholds, **given, **common, "phash": drop_phash}
    dedup_cfg = dedup.DedupConfig(search=how, **choices)
    cluster_cfg = cluster_tables.ClusterConfig(**{**r.cluster.model_dump(), **common})
    retrieve_cfg = modes.RetrieveConfig(sets=_sets(r), search=how, **common)
    faces = faces_config(r)
    shards_cfg = shards.ShardsConfig(name=r.name, faces=faces, **r.shards.model_dump(), **common)
    lineage_cfg = lineage.LineageConfig(embed_cfg.embedding)
    report_cfg = report.ReportConfig(r.name, dump(r), embed_cfg.embedding, r.seed, faces)

    def stage(name: str, cfg: Any, reads: tuple[str, ...], run: Any) -> Stage:
        return Stage(name, dataclasses.asdict(cfg), reads, lambda f, s, x, e: run(cfg, f, s, x, e))

    def ingest_run(f: str, store: Store, executor: Executor, events: Events) -> StageReport:
        return ingest.run(ingest_cfg, surveys, f, store, executor, events)

    return [
        Stage("ingest", ingest.identity(ingest_cfg, surveys), (), ingest_run),
        stage("embed", embed_cfg, ("ingest",), embed.run),
        stage("dedup", dedup_cfg, ("embed",), dedup.run),
        stage("cluster", cluster_cfg, ("dedup",), cluster.run),
        stage("retrieve", retrieve_cfg, ("dedup", "cluster"), retrieve.run),
        stage("shards", shards_cfg, ("retrieve",), shards.run),
        stage("lineage", lineage_cfg, ("shards",), lineage.run),
        stage("report", report_cfg, ("lineage",), report.run),
    ]


def run(
    recipe: Recipe,
    store: Store,
    make_executor: Callable[[int], Executor],
    events: Events,
    until: str | None = None,
) -> list[StageReport]:
    """Runs what is not done yet, up to and including `until`; returns every stage's report.

    `make_executor` is called with the number of images found, and only when there is work.
    Errors: StoreError, EncoderError, RecipeError, each for people.
    """
    one_thread()
    surveys = ingest.survey(ingest_config(recipe))
    stages = plan(recipe, surveys)
    prints = _fingerprints(stages)
    store.write(RECIPE_FILE, dump(recipe).encode())
    for stage in stages:  # what another recipe did is not this one's, even before it comes there
        if completed(store, stage.name, prints[stage.name]) is None:
            forget(store, stage.name)
    executor: Executor | None = None
    reports = []
    try:
        for stage in stages:
            done = completed(store, stage.name, prints[stage.name])
            if done is None:
                with events.stage(stage.name):
                    executor = executor or make_executor(sum(s.estimate() for s in surveys))
                    done = stage.run(prints[stage.name], store, executor, events)
            reports.append(done)
            if stage.name == until:
                break
    finally:
        if executor is not None:
            executor.close()
    return reports


def _fingerprints(stages: list[Stage]) -> dict[str, str]:
    prints: dict[str, str] = {}
    for stage in stages:
        inputs = [prints[name] for name in stage.reads]
        prints[stage.name] = fingerprint(stage.name, VERSIONS[stage.name], stage.identity, inputs)
    return prints


def drop_retryable(recipe: Recipe, store: Store) -> int:
    """Forgets the parts that hold images whose fault may have gone away; returns how many."""
    fetched = fetch.retryable(store)
    dropped = []
    embedded = Embedded(embed_config(recipe).embedding)
    if read_report(store, "ingest") is not None:
        dropped = embed.retryable(store, embedded)
    # Their fingerprints stay the same, so the stages have to be told.
    for name in STAGES[STAGES.index("ingest" if fetched else "embed") :]:
        if fetched or dropped:
            restart(store, name)
    for table in fetched:
        fetch.try_again(store, table)
    for part in dropped:
        store.delete(embedded.vectors_path(part))
    return len(fetched) + len(dropped)


def warnings(recipe: Recipe) -> list[str]:
    """What is allowed in a recipe, but is likely a mistake."""
    own = copy_thresholds(builtin=True)
    given = recipe.dedup.model_dump()
    found = [
        f"warning: dedup.{name}: {given[name]} is meant for SSCD; the built-in copy descriptor has"
        f" another scale and links unlike images below {own[name]} (leave it out to take that)"
        for name in own
        if recipe.copy_descriptor.weights == "builtin" and (given[name] or 1) < own[name]
    ]
    k = recipe.cluster.k
    if recipe.cluster.start == "k-means++" and k > SEEDED:
        found.append(
            f"warning: cluster.start: k-means++ chooses {k:,} centroids one after the other, which"
            f" takes hours above {SEEDED:,}; `random` takes seconds"
        )
    return found


def ingest_config(recipe: Recipe) -> ingest.IngestConfig:
    """All sources in the order of the images' numbers: curated sets, holdout sets, pool."""
    named: list[tuple[str, Mapping[str, Source]]] = [
        ("curated", recipe.sources.curated),
        ("holdout", recipe.sources.holdout),
    ]
    specs = [
        ingest.SourceSpec(f"sources.{role}.{name}", role, name, source.uri, source.format)
        for role, sets in named
        for name, source in sets.items()
    ]
    for number, source in enumerate(recipe.sources.pool):
        field = f"sources.pool.{number}"
        specs.append(ingest.SourceSpec(field, "pool", "", source.uri, source.format))
    given = recipe.fetch.model_dump() | {"robots": recipe.fetch.robots == "respect"}
    how = FetchConfig(**given, max_bytes=recipe.images.max_bytes)
    budget = fetch.Budget(recipe.failures.max_share, recipe.failures.min_images)
    fetching = fetch.Fetching(how, budget)
    return ingest.IngestConfig(tuple(specs), recipe.resources.part_images, fetching)


def embed_config(recipe: Recipe) -> embed_worker.EmbedConfig:
    """Models and limits, with the identity of the weights' content settled."""
    r = recipe
    weights = "builtin" if r.encoder.model == DEMO_MODEL else r.encoder.weights
    versions = [
        _weights_version("encoder.weights", weights, "semantic", r.encoder.model),
        _weights_version("copy_descriptor.weights", r.copy_descriptor.weights, "copy", ""),
    ]
    return embed_worker.EmbedConfig(
        model=r.encoder.model,
        weights=weights,
        precision=r.encoder.precision,
        compile=r.encoder.compile,
        decoder=r.encoder.decoder,
        batch=r.encoder.batch,
        copy_weights=r.copy_descriptor.weights,
        weights_version=" ".join(versions),
        limits=Limits(**r.images.model_dump()),
        filter=_filter_config(r),
        phash_bits=r.safety.phash.bits if r.safety.phash else None,
        max_rejected_share=r.failures.max_share,
        min_images=r.failures.min_images,
    )


def _filter_config(recipe: Recipe) -> FilterConfig | None:
    given = recipe.safety.filter
    if given is None:
        return None
    cfg = packaged(FilterConfig(**given.model_dump(), version=""))
    version = _weights_version("safety.filter.weights", cfg.weights, "", "")
    return dataclasses.replace(cfg, version=version)


def faces_config(recipe: Recipe) -> FacesConfig | None:
    given = recipe.safety.faces
    if given is None:
        return None
    haar = given.detector == HAAR
    version = "" if haar else _weights_version("safety.faces.detector", given.detector, "", "")
    limits = Limits(**recipe.images.model_dump())
    cfg = FacesConfig(**given.model_dump(), limits=limits, version=version)
    shards.load_faces(cfg)  # what can't be used is told now, not after days of embedding
    return cfg


def _weights_version(field: str, weights: str, kind: str, model: str) -> str:
    if weights == "builtin":
        return builtin_digest(kind)
    if weights == "hub":
        return f"hub:{model}"
    root, name = split_uri(weights)
    try:
        store = open_store(root)
        if weights.startswith("s3://"):
            return store.stat(name).version
        digest = hashlib.sha256()
        with store.open(name) as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    except StoreError as error:
        raise RecipeError(f"{field}: {error}; give a file, an s3:// uri or leave it out") from None


def _draw_config(draw: ClusterDraw) -> modes.ClusterDrawConfig:
    return modes.ClusterDrawConfig(**draw.model_dump(exclude={"expected_clusters"}))


def _sets(recipe: Recipe) -> tuple[modes.SetConfig, ...]:
    sets = []
    for name, source in recipe.sources.curated.items():
        sample, draw, above = source.sample, source.cluster, source.hierarchical
        counts = above.counts(recipe.cluster.k) if above else ()
        sets.append(
            modes.SetConfig(
                name=name,
                as_is=source.as_is,
                sample=modes.SampleConfig(**sample.model_dump()) if sample else None,
                cluster=_draw_config(draw) if draw else None,
                hierarchical=modes.HierarchicalConfig(counts, above.target_size) if above else None,
            )
        )
    return tuple(sets)
