"""What the curated sets of a recipe take, mode by mode, before any image is there: its dry run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from curation.recipe import CuratedSource, Recipe, RecipeError, Source
from curation.runtime.store import StoreError
from curation.stages import ingest


@dataclass(frozen=True)
class Sizes:
    """Images of every source, and how many of all lie in folders, not in archives.

    `listed` if some were counted instead of declared (those in archives are estimated).
    """

    pool: int
    curated: Mapping[str, int]
    holdout: Mapping[str, int]
    in_folders: int = 0
    listed: bool = False

    @property
    def total(self) -> int:
        return self.pool + sum(self.curated.values()) + sum(self.holdout.values())


@dataclass(frozen=True)
class Share:
    """What one mode of a set asks for, and takes at most after its cap; `note` says why less."""

    set: str
    images: int
    how: str
    asked: int
    taken: int
    note: str = ""


def sizes(recipe: Recipe, cfg: ingest.IngestConfig, pool: int | None = None) -> Sizes:
    """The images that the recipe declares; sources that declare none are listed.

    `pool` overrides the size of the pool. Raises RecipeError that names every one without either.
    """
    declared: dict[str, Source] = {
        f"sources.curated.{name}": one for name, one in recipe.sources.curated.items()
    }
    declared |= {f"sources.holdout.{name}": one for name, one in recipe.sources.holdout.items()}
    declared |= {f"sources.pool.{n}": one for n, one in enumerate(recipe.sources.pool)}
    given = {field: _given(field, one, pool) for field, one in declared.items()}
    counted, missing, in_folders = {}, [], 0
    for spec in cfg.sources:
        if given[spec.field] is not None:
            in_folders += given[spec.field] or 0 if spec.format == "folder" else 0
        else:
            try:
                (found,) = ingest.survey(replace(cfg, sources=(spec,)))
                counted[spec.field] = found.estimate()
                in_folders += found.image_files
            except StoreError as error:
                missing.append(f"{spec.field}.images: is missing, and {error}")
    if missing:
        raise RecipeError("say how many images these hold\n  " + "\n  ".join(missing))
    known = {field: given[field] or counted.get(field, 0) for field in given}

    def of(role: str) -> dict[str, int]:
        start = f"sources.{role}."
        return {f.removeprefix(start): n for f, n in known.items() if f.startswith(start)}

    in_pool = sum(of("pool").values()) if pool is None else pool
    return Sizes(in_pool, of("curated"), of("holdout"), in_folders, bool(counted))


def _given(field: str, source: Source, pool: int | None) -> int | None:
    if pool is not None and field.startswith("sources.pool."):
        return 0
    return source.images


def shares(recipe: Recipe, found: Sizes) -> list[Share]:
    """What each mode of each set takes, in the recipe's order."""
    curated = recipe.sources.curated
    return [
        share
        for name, source in curated.items()
        for share in _of_set(name, source, found.curated[name], recipe.cluster.k)
    ]


def _of_set(name: str, source: CuratedSource, images: int, clusters: int) -> Iterator[Share]:
    if source.as_is:
        yield Share(name, images, "as is", images, images)
    if one := source.sample:
        yield Share(name, images, f"sample, k {one.k}", one.k * images, one.k * images)
    if draw := source.cluster:
        fit = min(images // draw.min_queries, clusters)
        expected = fit if draw.expected_clusters is None else draw.expected_clusters
        asked = expected * draw.per_cluster
        guess = "up to " if draw.expected_clusters is None else ""
        how = f"cluster, {guess}{expected:,} x {draw.per_cluster:,}"
        note = f"capped at {draw.cap:,}" if asked > draw.cap else ""
        if expected > fit:
            few = f"{images:,} images put {draw.min_queries} in at most {fit:,} clusters"
            note = f"{note}; {few}" if note else few
        yield Share(name, images, how, asked, min(asked, draw.cap), note)
    if balanced := source.hierarchical:
        size = balanced.target_size
        yield Share(name, images, "hierarchical", size, size)


def print_shares(rows: list[Share], found: Sizes) -> None:
    """The table, and what its total means."""
    wide = max(len("set"), *(len(row.set) for row in rows))
    how = max(len("mode"), *(len(row.how) for row in rows))
    print(f"{'set':<{wide}} {'images':>12}  {'mode':<{how}} {'asks for':>13} {'takes':>13}")
    last = ""
    for row in rows:
        name, images = ("", "") if row.set == last else (row.set, f"{row.images:,}")
        line = f"{name:<{wide}} {images:>12}  {row.how:<{how}} {row.asked:>13,} {row.taken:>13,}"
        print(f"{line}  {row.note}".rstrip())
        last = row.set
    total = sum(row.taken for row in rows)
    print(f"{'total':<{wide}} {'':>12}  {'':<{how}} {'':>13} {total:>13,}")
    print("\nAt most: an image that several images or sets ask for counts each time, and is in the")
    print("shards once; sets lose their rejected images, and what lies near the holdout.")
    if found.listed:
        print("Sources without `images` were listed; images in archives are estimated from bytes.")
    if found.pool < total:
        print(f"The pool has {found.pool:,} images, fewer than asked for.")
