"""Random small runs against what must hold for every run, recomputed by brute force."""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml
from finished import counts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from workbench import Models, picture

from curation.cli import main
from curation.runtime.store import FileStore
from curation.stages.tables import Embedded, read_parts

EPSILON = 1e-5  # of a cosine: the order of a sum
DECISIONS = {"selected", "not_retrieved", "duplicate", "near_holdout", "rejected"}

modes = st.lists(
    st.one_of(
        st.just("as_is"),
        st.builds(
            lambda k, c: {"sample": {"k": k, "collisions": c}},
            st.integers(1, 6),
            st.sampled_from(["merge", "backfill"]),
        ),
        st.builds(
            lambda per, least, cap: {
                "cluster": {"per_cluster": per, "min_queries": least, "cap": cap}
            },
            st.integers(1, 4),
            st.integers(1, 3),
            st.integers(1, 12),
        ),
        st.builds(
            lambda levels, size: {"hierarchical": {"levels": levels, "target_size": size}},
            st.sampled_from([1, 2, [3, 2]]),
            st.integers(1, 14),
        ),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda mode: mode if isinstance(mode, str) else next(iter(mode)),
)
kinds = st.sampled_from(["new", "new", "new", "larger", "quality", "same", "broken", "tiny"])
folders = st.sampled_from(["pool", "pool", "pool", "pool", "curated", "holdout"])
images = st.lists(st.tuples(folders, kinds, st.integers(0, 11)), min_size=8, max_size=24)


def write(path: Path, kind: str, seed: int) -> None:
    """An image that is new, a copy of the one with the same seed, or none that can be used."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "broken":
        path.write_bytes(b"\xff\xd8\xff" + bytes([seed]))
    elif kind == "tiny":
        picture(seed, 20, 20).save(path)
    elif kind == "larger":
        picture(seed, 150, 140).save(path)
    else:
        picture(seed).save(path, quality=60 if kind == "quality" else 75)


@dataclass
class Finished:
    """A finished run with its images, by number."""

    folder: Path
    recipe: dict[str, Any]
    rows: list[dict[str, Any]]
    semantic: dict[int, Any]
    copy: dict[int, Any]

    def of(self, source: str, *decisions: str) -> list[dict[str, Any]]:
        return [
            row
            for row in self.rows
            if row["source"] == source and (not decisions or row["decision"] in decisions)
        ]


def vectors(run: Path) -> tuple[dict[int, Any], dict[int, Any]]:
    """Both fp16 vectors of every usable image by its number, as fp32."""
    store = FileStore(str(run))
    embedded = Embedded(counts(run, "embed")["embedding"])
    found: tuple[dict[int, Any], dict[int, Any]] = ({}, {})
    for part in read_parts(store):
        for column, into in zip(("semantic", "copy"), found, strict=True):
            numbers, rows = embedded.vectors(store, part, column)
            into.update(zip(numbers.tolist(), rows, strict=True))
    return found


def run(folder: Path, models: Models, drawn: list[Any], **recipe: Any) -> Finished | None:
    """Writes the images and a sure one for each role, runs, and reads everything back."""
    sure = [("pool", "new", 20), ("curated", "new", 21)]
    if any(where == "holdout" for where, *_ in drawn):
        sure.append(("holdout", "new", 22))  # a set without one image that can be used is an error
    for number, (where, kind, seed) in enumerate([*sure, *drawn]):
        write(folder / where / f"{number:03d}.jpg", kind, seed)
    sources = recipe.pop("sources")
    if (folder / "holdout").exists():
        sources["holdout"] = {"test": {"uri": str(folder / "holdout")}}
    whole = {
        "name": "random",
        "output": str(folder / "run"),
        "sources": sources,
        "encoder": {"model": "test_vit", "weights": str(models.encoder)},
        "copy_descriptor": {"weights": str(models.descriptor)},
        **recipe,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole))
    if main(["run", str(path), "--ray", "off"]) != 0:
        check_nothing_left(folder / "run")
        return None
    out = folder / "lineage.parquet"
    assert main(["lineage", str(folder / "run"), "--out", str(out)]) == 0
    return Finished(folder, whole, pq.read_table(out).to_pylist(), *vectors(folder / "run"))


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_what_holds_for_every_run(data: st.DataObject, tmp_path: Path, models: Models) -> None:
    folder = tmp_path / "example"
    shutil.rmtree(folder, ignore_errors=True)
    retrieve = data.draw(modes)
    fewest = 4 if any("hierarchical" in mode for mode in retrieve) else 1  # as its levels ask
    work = run(
        folder,
        models,
        data.draw(images),
        seed=data.draw(st.integers(0, 2**40)),
        sources={
            "pool": [{"uri": str(folder / "pool")}],
            "curated": {"wanted": {"uri": str(folder / "curated"), "retrieve": retrieve}},
        },
        dedup={"min_cosine": 0.95, "holdout_min_cosine": 0.9},
        cluster={"k": data.draw(st.integers(fewest, 6))},
        search={"exact_below": data.draw(st.sampled_from([0, 100_000])), "target_recall": 0.99},
        shards={"images_per_shard": data.draw(st.integers(1, 9))},
        resources={"part_images": data.draw(st.integers(1, 9))},
    )
    if work is None:
        return
    check_lineage(work)
    check_shards(work)
    check_holdout(work)
    check_duplicates(work)
    for mode in work.recipe["sources"]["curated"]["wanted"]["retrieve"]:
        if "sample" in mode:
            check_sample(work, **mode["sample"])
        elif "cluster" in mode:
            check_cluster(work, **mode["cluster"])
        elif "hierarchical" in mode:
            check_hierarchical(work, mode["hierarchical"]["target_size"])


def check_nothing_left(run: Path) -> None:
    """The only reasons for which such a run may stop, each said in one line."""
    failed = [json.loads(path.read_text()) for path in (run / "status").glob("*.json")]
    said = [status["message"] for status in failed if status["state"] == "failed"]
    assert len(said) == 1
    assert said[0] in (
        "cluster: no pool image is left after dedup; there is nothing to cluster",
        "retrieve: nothing was selected; no curated image is left",
        "retrieve: nothing was selected; no cluster holds min_queries images of a set",
    )


def check_lineage(work: Finished) -> None:
    """One row a file, one decision a row, rejected exactly what can't be used."""
    files = [p for x in ("curated", "holdout", "pool") for p in (work.folder / x).glob("*")]
    assert sorted(row["uri"] for row in work.rows) == sorted(str(path) for path in files)
    assert [row["image"] for row in work.rows] == list(range(len(files)))
    assert {row["decision"] for row in work.rows} <= DECISIONS
    for row in work.rows:
        assert (row["decision"] == "rejected") == (row["image"] not in work.copy)
        assert (row["decision"] == "selected") == bool(row["shard"])
        assert row["id"] == hashlib.sha256(Path(row["uri"]).read_bytes()).hexdigest()


def check_shards(work: Finished) -> None:
    """Each selected image once, in the shard its row names, with its own bytes."""
    found = Counter[str]()
    for path in sorted((work.folder / "run" / "shards").glob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            found[sample["__key__"]] += 1
            assert hashlib.sha256(sample["jpg"]).hexdigest() == sample["__key__"]
            assert json.loads(sample["json"])["id"] == sample["__key__"]
    chosen = [row["id"] for row in work.rows if row["decision"] == "selected"]
    assert found == Counter(chosen)
    assert max(found.values(), default=1) == 1


def check_holdout(work: Finished) -> None:
    """Nothing selected is near an evaluation image."""
    held = [work.copy[row["image"]] for row in work.of("holdout") if row["image"] in work.copy]
    for row in work.rows:
        if row["decision"] == "selected" and held:
            nearest = max(float(work.copy[row["image"]] @ other) for other in held)
            assert nearest <= work.recipe["dedup"]["holdout_min_cosine"] + EPSILON


def check_duplicates(work: Finished) -> None:
    """A duplicate's group holds the image that stays; no two that stay are near each other."""
    by_id: dict[str, list[dict[str, Any]]] = {}
    for row in work.rows:
        by_id.setdefault(row["id"], []).append(row)
    for row in work.of("pool", "duplicate"):
        if "another source" not in row["reason"]:
            stays = [r for r in by_id[row["reason"].split()[1]] if r["source"] == "pool"]
            assert row["component"] is not None
            assert any(
                (
                    r["component"] == row["component"]
                    and r["decision"] in ("selected", "not_retrieved")
                )
                or "another source" in r["reason"]
                for r in stays
            )
    kept = [work.copy[row["image"]] for row in kept_pool(work)]
    for number, one in enumerate(kept):
        for other in kept[:number]:
            assert float(one @ other) <= work.recipe["dedup"]["min_cosine"] + EPSILON


def kept_pool(work: Finished) -> list[dict[str, Any]]:
    """The pool after dedup; the same bytes may be selected under a curated image."""
    return [
        row
        for row in work.of("pool")
        if row["decision"] in ("selected", "not_retrieved") or "another source" in row["reason"]
    ]


def queries(work: Finished) -> list[dict[str, Any]]:
    """Every usable image of the set, twice if it is there twice; none that is near the holdout."""
    return work.of("curated", "selected", "not_retrieved", "duplicate")


def reasons(work: Finished, how: str) -> list[tuple[str, dict[str, Any]]]:
    """(id of the image, reason) of one way to be selected."""
    return [
        (row["id"], reason)
        for row in work.rows
        for reason in row["retrieved_by"]
        if reason["how"].startswith(how)
    ]


def check_sample(work: Finished, k: int, collisions: str) -> None:
    """The true k nearest of every query; with backfill k of its own while the pool lasts."""
    pool, asked = kept_pool(work), queries(work)
    base = np.stack([work.semantic[row["image"]] for row in pool]) if pool else np.empty((0, 1))
    found: dict[str, list[float]] = {}
    taken = Counter[str]()
    for image, reason in reasons(work, "sample"):
        found.setdefault(reason["query_id"], []).append(reason["cosine"])
        taken[image] += 1
    if collisions == "backfill":
        assert max(taken.values(), default=1) == 1
        assert sum(taken.values()) == min(k * len(asked), len(pool))
        return
    for query in {row["id"]: row for row in asked}.values():
        same = sum(row["id"] == query["id"] for row in asked)
        nearest = np.sort(base @ work.semantic[query["image"]])[::-1][:k]
        wanted = np.repeat(nearest, same)
        np.testing.assert_allclose(sorted(found[query["id"]]), np.sort(wanted), atol=EPSILON)


def check_cluster(work: Finished, per_cluster: int, min_queries: int, cap: int) -> None:
    """Draws come from clusters with enough queries, within their quotas."""
    run = work.folder / "run"
    table = pq.read_table(run / "cluster" / "centroids.parquet")
    centroids = np.stack(table["centroid"].to_numpy())
    hits = Counter(int(np.argmax(centroids @ work.semantic[row["image"]])) for row in queries(work))
    parts = [pq.read_table(path) for path in (run / "cluster" / "assignments").glob("*")]
    members = Counter(pa.concat_tables(parts)["cluster"].to_pylist())
    drawn = Counter(int(reason["how"].split(":")[1]) for _, reason in reasons(work, "cluster"))
    quota = {c: min(members[c], per_cluster) for c in members if hits[c] >= min_queries}
    assert sum(drawn.values()) == min(cap, sum(quota.values()))
    assert all(count <= quota[cluster] for cluster, count in drawn.items())


def check_hierarchical(work: Finished, target_size: int) -> None:
    """Every level's quotas are what was drawn below its clusters, none of which could give more."""
    run = work.folder / "run"
    rows = pq.read_table(run / "retrieve" / "hierarchy" / "wanted.parquet").to_pylist()
    parts = [pq.read_table(path) for path in (run / "cluster" / "assignments").glob("*")]
    leaf = {row["image"]: row["cluster"] for row in pa.concat_tables(parts).to_pylist()}
    chosen = {key for key, _ in reasons(work, "hierarchical")}
    pool = kept_pool(work)
    above = {(row["level"], row["cluster"]): row for row in rows}
    held, drawn = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for image in pool:
        node = above[1, leaf[image["image"]]]
        while node is not None:
            at = (node["level"], node["cluster"])
            held[at] += 1
            drawn[at] += image["id"] in chosen
            node = above.get((node["level"] + 1, node["parent"]))
    wanted = min(target_size, len(pool))
    for (level, cluster), row in above.items():
        assert (row["images"], row["quota"]) == (held[level, cluster], drawn[level, cluster])
    for level in {row["level"] for row in rows}:
        assert sum(row["quota"] for row in rows if row["level"] == level) == wanted
    for row in rows:
        siblings = [r for r in rows if (r["level"], r["parent"]) == (row["level"], row["parent"])]
        most = max(sibling["quota"] for sibling in siblings)
        assert row["quota"] == row["images"] or row["quota"] >= most - 1


def test_the_check_of_checks(tmp_path: Path, models: Models) -> None:
    """The brute force sees a wrong threshold: the checks above are not empty."""
    drawn = [("pool", "new", 1), ("pool", "larger", 1), ("holdout", "quality", 2)]
    drawn += [("pool", "new", 2)]
    sources = {
        "pool": [{"uri": str(tmp_path / "pool")}],
        "curated": {"wanted": {"uri": str(tmp_path / "curated")}},
    }
    dedup = {"min_cosine": 0.9999, "holdout_min_cosine": 0.9999}
    work = run(tmp_path, models, drawn, sources=sources, dedup=dedup, cluster={"k": 2})
    assert work is not None
    work.recipe["dedup"] = {"min_cosine": 0.95, "holdout_min_cosine": 0.9}
    with pytest.raises(AssertionError):
        check_duplicates(work)
    with pytest.raises(AssertionError):
        check_holdout(work)
