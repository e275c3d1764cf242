"""All tables -> `report/report.html` and `report/report.json`: what came in, what was written, why.

The page is one file that asks for nothing else: pictures are small data URIs, charts inline SVG.
The JSON holds the same facts, with ids and keys in place of the pictures.
"""

import json
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from curation.images.decode import Limits
from curation.images.faces import FacesConfig
from curation.runtime.events import Events
from curation.runtime.executor import Executor, timer
from curation.runtime.manifest import StageReport, begin, finish, read_report
from curation.runtime.readable import readable_bytes, readable_seconds
from curation.runtime.store import Store
from curation.schema import REPORT_HTML, REPORT_JSON
from curation.stages import report_examples as examples
from curation.stages import report_facts as facts
from curation.stages.shards import load_faces
from curation.stages.tables import Embedded, read_parts

STAGES = ("ingest", "embed", "dedup", "cluster", "retrieve", "shards", "lineage")


@dataclass(frozen=True)
class ReportConfig:
    """The run's name and resolved recipe, shown in the report."""

    name: str
    recipe: str
    embedding: str
    seed: int
    faces: FacesConfig | None = None


def run(
    cfg: ReportConfig, stage_fingerprint: str, store: Store, executor: Executor, events: Events
) -> StageReport:
    """Every stage's tables and markers -> `report/report.json` and `report/report.html`."""
    elapsed = timer()
    begin(store, "report", stage_fingerprint)
    stages = {}
    for name in STAGES:
        done = read_report(store, name)
        if done is not None:
            stages[name] = {"seconds": done.seconds, **done.counts}
    found, thumbnails = collect(cfg, stages, store)
    store.write(REPORT_JSON, json.dumps(found, indent=1).encode())
    store.write(REPORT_HTML, render(found, thumbnails).encode())
    counts = {"thumbnails": len(thumbnails)}
    return finish(store, StageReport("report", stage_fingerprint, counts, elapsed()))


def collect(
    cfg: ReportConfig, stages: dict[str, Any], store: Store
) -> tuple[dict[str, Any], dict[int, str]]:
    """Everything the report says, and the thumbnails by image number."""
    recipe = yaml.safe_load(cfg.recipe)
    embedded, parts = Embedded(cfg.embedding), read_parts(store)
    composition, retrieved = facts.composition(store, parts, stages, recipe)
    links = facts.duplicate_links(store)
    sizes = facts.cluster_sizes(store, parts, stages["cluster"]["clusters"])
    models, shards = facts.models(recipe, stages), stages["shards"]
    sampled = [mode["set"] for mode in stages["retrieve"]["modes"] if mode["how"] == "sample"]
    gallery = examples.gallery(store, embedded, parts, sampled, cfg.seed)
    groups = examples.duplicate_groups(store, parts, cfg.seed)
    clusters = examples.cluster_examples(store, parts, sizes, cfg.seed)
    shown = [image for one in (*groups, *clusters) for image in one["images"]]
    shown += [image for query in gallery for image in (query, *query["neighbours"])]
    show = examples.Showing(Limits(**recipe["images"]), load_faces(cfg.faces))
    thumbnails = examples.describe(store, embedded, parts, shown, show)
    found = {
        "name": cfg.name,
        "funnel": funnel(stages),
        "notices": facts.notices(models, stages),
        "composition": composition,
        "balance": facts.balance(stages),
        "gallery": gallery,
        "similarity": {"retrieved": retrieved, "duplicate_links": links},
        "duplicates": {
            **facts.group_sizes(stages["dedup"]),
            "groups": groups,
            "phash": facts.near_hashes(recipe, stages),
        },
        "clusters": {**facts.describe_clusters(sizes), "examples": clusters},
        "rejections": facts.rejections(store, embedded, parts),
        "searches": facts.searches(stages),
        "timings": facts.timings(stages),
        "models": models,
        "manifest": {name: shards[name] for name in ("hash", "images", "bytes", "shards")},
        "recipe": cfg.recipe,
        "stages": stages,
    }
    return found, thumbnails


def funnel(stages: dict[str, Any]) -> dict[str, int]:
    """The pool's way through the pipeline, and what was written."""
    pool = stages["lineage"]["decisions"]["pool"]
    total = sum(pool.values())
    usable = total - pool["rejected"]
    kept = stages["dedup"]["kept"]
    return {
        "pool images": total,
        "rejected": pool["rejected"],
        "usable": usable,
        "duplicates": stages["dedup"]["duplicate"],
        "near evaluation": stages["dedup"]["near_holdout"],
        "kept": kept,
        "retrieved": pool["selected"],
        "curated as is": stages["lineage"]["decisions"]["curated"]["selected"],
        "written": stages["shards"]["images"],
    }


def render(found: dict[str, Any], thumbnails: dict[int, str]) -> str:
    """The page. Keys and metadata are hostile text: everything is escaped."""
    pages = Environment(
        loader=PackageLoader("curation.stages", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"count": "{:,}".format, "cosine": "{:.3f}".format}
    pages.filters |= {"size": readable_bytes, "time": readable_seconds}
    return pages.get_template("report.html.j2").render(**found, thumbnails=thumbnails)
