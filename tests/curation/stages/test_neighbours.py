"""The search of dedup and retrieve over files: against brute force, in buckets, waves and slabs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from curation.algorithms import crowds, knn
from curation.algorithms.components import Components
from curation.algorithms.products import Floats, Ints
from curation.runtime.events import Events
from curation.runtime.executor import InProcessExecutor
from curation.runtime.store import Store, StoreError, open_store
from curation.stages import neighbour_index, neighbours
from curation.stages.neighbour_plan import Join, SearchConfig
from curation.stages.neighbours import answers, search
from curation.stages.tables import Part

PART_ROWS = 300


@dataclass(frozen=True)
class Saved:
    """Stands where a VectorView does: rows of a file by part."""

    path: Path

    def load(self, store: Store, part: Part) -> tuple[Ints, Floats]:
        rows = np.load(self.path, mmap_mode="r")[part.base : part.base + part.rows]
        return np.arange(part.base, part.base + part.rows), np.array(rows, np.float32)


def parts_of(first: int, last: int) -> list[Part]:
    starts = range(first, last, PART_ROWS)
    return [
        Part(n, "pool", "", "", "", "", 0, min(PART_ROWS, last - start), start, str(start))
        for n, start in enumerate(starts)
    ]


def clustered(count: int, seed: int = 0, dim: int = 32) -> Floats:
    """Unit rows around 40 directions, a tenth of them near-copies of others; exact in fp16."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((40, dim))[rng.integers(0, 40, count)]
    rows += 0.9 * rng.standard_normal((count, dim))
    copies = rng.choice(count, count // 10, replace=False)
    rows[copies] = rows[rng.integers(0, count, len(copies))]
    rows[copies] += 0.3 * rng.standard_normal((len(copies), dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found: Floats = rows.astype(np.float16).astype(np.float32)
    return found


Found = dict[int, list[tuple[int, float]]]


@pytest.fixture
def find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Found]]:
    """Searches rows in small chunks and buckets; returns the facts and each query's neighbours."""
    monkeypatch.setattr(neighbours, "CHUNK_ROWS", 1000)
    monkeypatch.setattr(neighbour_index, "BUCKET_ROWS", 700)
    monkeypatch.setattr(neighbours, "SLAB_ROWS", 1500)
    monkeypatch.setattr(knn, "ROWS_PER_CELL", 50)

    def run(rows: Floats, queries: int = 0, **options: Any) -> tuple[Any, Found]:
        """The first `queries` rows ask in the others; all in all, when there are none."""
        np.save(tmp_path / "rows.npy", rows)
        view: Any = Saved(tmp_path / "rows.npy")
        how = SearchConfig(
            options.get("method", "cells"),
            options.get("exact_below", 0),
            options.get("target_recall", 0.95),
            options.get("spill_bytes", 10**9),
        )
        k, floor = options.get("k", 5), options.get("min_cosine", -2.0)
        store = open_store(str(tmp_path / "run"))
        folder = f"search{len(list(store.list()))}"
        join = Join("dedup", folder, view, view, k, floor, not queries, how, 0)
        events = Events(store)
        base = parts_of(queries, len(rows))
        asking = parts_of(0, queries) if queries else base
        facts = search(join, asking, base, store, InProcessExecutor(), events)
        left = {entry.path.split("/")[1] for entry in store.list(folder)}
        assert left == {"answers", "search.json"}  # nothing temporary stays
        found: Found = {}
        for table in answers(join, store):
            for row in table.to_pylist():
                found.setdefault(row["query"], []).append((row["image"], row["cosine"]))
        return facts, found

    return run


def brute_force(rows: Floats, queries: int, k: int, floor: float) -> dict[int, list[float]]:
    """The cosines of each query's true neighbours, falling."""
    cosine = (rows[:queries] if queries else rows) @ rows[queries:].T
    if not queries:
        np.fill_diagonal(cosine, -9)
    best = -np.sort(-cosine, axis=1)[:, :k]
    return {q: [float(c) for c in line if c > floor] for q, line in enumerate(best)}


def share_found(found: Found, truth: dict[int, list[float]], rows: Floats, queries: int) -> float:
    """Recall; checks on the way that every answer is a true pair, once, in order."""
    hits = wanted = 0
    for query, cosines in truth.items():
        got = found.get(query, [])
        images = [image for image, _ in got]
        assert len(set(images)) == len(images)
        assert query not in images
        assert [c for _, c in got] == sorted((c for _, c in got), reverse=True)
        for image, cosine in got:
            assert image >= queries
            assert abs(float(rows[query] @ rows[image]) - cosine) < 1e-5
        last = cosines[-1] - 1e-6 if cosines else 9
        hits += min(len(cosines), sum(c >= last for _, c in got))
        wanted += len(cosines)
    return hits / wanted


@pytest.mark.parametrize(
    ("queries", "options"),
    [
        (0, {"k": 8, "min_cosine": 0.6}),
        (0, {"k": 2, "min_cosine": 0.3, "spill_bytes": 100_000}),
        (900, {"k": 5}),
        (1300, {"k": 40, "spill_bytes": 100_000}),
        (700, {"k": 5, "method": "ivfpq"}),
        (0, {"k": 8, "min_cosine": 0.6, "method": "ivfpq"}),
    ],
)
def test_the_search_reaches_its_target_against_brute_force(
    find: Callable[..., Any], queries: int, options: dict[str, Any]
) -> None:
    rows = clustered(5000)
    facts, found = find(rows, queries, **options)
    truth = brute_force(rows, queries, options["k"], options.get("min_cosine", -2.0))
    assert share_found(found, truth, rows, queries) > 0.93
    assert facts["recall"] >= 0.95
    if facts["method"] == "cells":
        assert facts["buckets"] > 3
        assert facts["nprobe"] < facts["cells"] / 2
        assert (facts["waves"] > 1) == ("spill_bytes" in options)


@pytest.mark.parametrize(
    ("base", "queries", "cells"),
    [(100_000_000, 100, 3051), (100_000_000, 25_000_000, 13_416), (1000, 100, 3), (100, 100, 1)],
    ids=["as buckets need", "as queries need", "of 256 rows", "one"],
)
def test_few_queries_need_few_cells(base: int, queries: int, cells: int) -> None:
    assert neighbour_index.cell_count(base, queries) == cells


def test_comparing_all_is_exact(find: Callable[..., Any]) -> None:
    rows = clustered(1500)
    facts, found = find(rows, 0, exact_below=2000, k=7, min_cosine=0.2)
    assert facts == {"method": "exact", "recall": 1.0}
    assert share_found(found, brute_force(rows, 0, 7, 0.2), rows, 0) == 1.0


def test_waves_and_buckets_change_nothing(
    find: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = clustered(3000)
    _, found = find(rows, k=6, min_cosine=0.4)
    assert find(rows, k=6, min_cosine=0.4, spill_bytes=50_000)[1] == found
    monkeypatch.setattr(neighbour_index, "BUCKET_ROWS", 250)
    assert find(rows, k=6, min_cosine=0.4)[1] == found


def test_equal_rows_by_the_thousand_hang_together(find: Callable[..., Any]) -> None:
    rows = clustered(4000)
    rows[1000:3500] = rows[17]
    _, found = find(rows, k=8, min_cosine=0.6)
    reached, todo = {17}, [17]
    links: dict[int, set[int]] = {}
    for query, got in found.items():
        for image, _ in got:
            links.setdefault(query, set()).add(image)
            links.setdefault(image, set()).add(query)
    while todo:
        for image in links[todo.pop()] - reached:
            reached.add(image)
            todo.append(image)
    assert set(range(1000, 3500)) <= reached


@pytest.mark.parametrize("count", [1, 2, 60])
def test_few_rows(find: Callable[..., Any], count: int) -> None:
    rows = clustered(count)
    _, found = find(rows, k=3)
    assert share_found(found, brute_force(rows, 0, 3, -2.0), rows, 0) == 1.0 if count > 1 else True
    assert set(found) == (set(range(count)) if count > 1 else set())


def test_a_recall_that_cannot_be_reached_is_an_error(
    find: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "LONGEST_WAY", 2)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4000, 64))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with pytest.raises(StoreError, match=r"recall 0\.999.*search\.target_recall"):
        find(rows.astype(np.float16).astype(np.float32), target_recall=0.999)


def test_a_crowd_is_joined_through_few_of_its_rows(
    find: Callable[..., tuple[Any, Found]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crowds, "CROWD", 10)
    rows = clustered(3000)
    rng = np.random.default_rng(5)
    crowd = np.sort(rng.choice(3000, 1200, replace=False))
    rows[crowd] = rows[crowd[0]] + 0.005 * rng.standard_normal((1200, 32))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    facts, found = find(rows.astype(np.float32), min_cosine=0.7)
    edges = Components(3000)
    pairs = np.array([(query, image) for query in found for image, _ in found[query]])
    edges.add(pairs[:, 0], pairs[:, 1])
    assert len(np.unique(edges.labels()[crowd])) == 1
    assert len(np.intersect1d(pairs[:, 1], crowd)) < 600
    assert facts["recall"] >= 0.95


def test_searches_of_one_base_find_together_what_each_finds_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "CHUNK_ROWS", 500)
    monkeypatch.setattr(neighbour_index, "BUCKET_ROWS", 700)
    monkeypatch.setattr(knn, "ROWS_PER_CELL", 50)
    np.save(tmp_path / "rows.npy", clustered(4000))
    view: Any = Saved(tmp_path / "rows.npy")
    how, base = SearchConfig("cells", 0, 0.95, 10**9), parts_of(1500, 4000)
    # Each so many that the base is put in as many cells for one as for both.
    asked = {"few": (4, parts_of(0, 750)), "many": (9, parts_of(750, 1500))}
    store = open_store(str(tmp_path / "run"))
    crew = neighbours.Crew(store, InProcessExecutor(), Events(store))

    def joins(folder: str, shared: str) -> list[neighbours.Search]:
        return [
            (Join("retrieve", f"{folder}/{n}", view, view, k, -2.0, False, how, 0, shared), parts)
            for n, (k, parts) in asked.items()
        ]

    apart = [neighbours.search_all([one], base, crew)[0] for one in joins("apart", "")]
    together = neighbours.search_all(joins("together", "index"), base, crew)
    assert together == apart
    for (one, _), (other, _) in zip(joins("apart", ""), joins("together", "index"), strict=True):
        found = [pa.concat_tables(answers(join, crew.store)) for join in (one, other)]
        assert found[0].equals(found[1])
        assert len(found[0]) == sum(part.rows for part in asked[one.folder[6:]][1]) * one.k
    assert not list(crew.store.list("index"))
