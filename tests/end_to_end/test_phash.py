"""Duplicates by perceptual hash, on real photographs and their copies: told, or dropped."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.fftpack
from finished import counts, manifest_hash
from PIL import Image, ImageOps
from workbench import Project

skimage = pytest.importorskip("skimage")
PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "rocket", "clock", "moon", "page")
COLOURS = ((250, 20, 20), (20, 250, 20), (20, 20, 250))
Row = dict[str, Any]


def photographs(project: Callable[..., Project]) -> Project:
    """Photographs, small grey copies that the descriptor takes for others, one that it knows, the
    same bytes again, and images of one colour."""
    work = project(pool=range(4), dedup={"min_cosine": 0.99, "holdout_min_cosine": 0.99})
    work.recipe["sources"]["curated"]["wanted"]["retrieve"] = [{"sample": {"k": 100}}]
    pool = work.folder / "pool"
    for name in PHOTOGRAPHS:
        image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        image.save(pool / f"{name}.png")
        if name in ("astronaut", "chelsea", "coffee"):
            ImageOps.grayscale(image).reduce(2).save(pool / f"{name}-small.png")
        if name == "moon":
            image.save(pool / "moon.jpg", quality=50)
    (pool / "again.png").write_bytes((pool / "coffee.png").read_bytes())
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (64, 64), colour).save(pool / f"flat-{number}.png")
    return work


def pool_rows(work: Project) -> list[Row]:
    return [row for row in work.lineage() if row["source"] == "pool"]


def by_scipy(path: Any) -> int:
    """The hash as `imagehash.phash` defines it."""
    grey = Image.open(path).convert("RGB").convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    dct = scipy.fftpack.dct(scipy.fftpack.dct(np.asarray(grey), axis=0), axis=1)[:8, :8]
    bits = (dct > np.median(dct)).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def expected(work: Project, rows: list[Row], bits: int) -> dict[str, tuple[str, int]]:
    """By key, the id that stays instead and the distance: every image against all better ones."""
    ranked = sorted(rows, key=lambda row: (-row["width"] * row["height"], row["id"], row["image"]))
    stay: list[Row] = []
    found: dict[str, tuple[str, int]] = {}
    seen: set[str] = set()
    for row in ranked:
        if row["key"].startswith("flat") or row["id"] in seen:
            continue
        seen.add(row["id"])
        mine = by_scipy(work.folder / "pool" / row["key"])
        near = [
            (apart, order, one["id"])
            for order, one in enumerate(stay)
            if (apart := (mine ^ by_scipy(work.folder / "pool" / one["key"])).bit_count()) <= bits
        ]
        if near:
            apart, _, kept = min(near)
            found[row["key"]] = (kept, apart)
        else:
            stay.append(row)
    return found


def told(rows: list[Row]) -> dict[str, tuple[str, int]]:
    return {
        row["key"]: (row["phash_duplicate_of"], row["phash_bits"])
        for row in rows
        if row["phash_duplicate_of"] is not None
    }


def decisions(rows: list[Row]) -> dict[str, tuple[str, str]]:
    return {row["key"]: (row["decision"], row["reason"]) for row in rows}


def report(work: Project) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((work.run_folder / "report" / "report.json").read_text())
    return found


def test_copies_are_told_and_then_dropped(project: Callable[..., Project]) -> None:
    work = photographs(project)
    assert work.run() == 0
    plain, was = pool_rows(work), manifest_hash(work.run_folder)
    assert told(plain) == {}
    assert report(work)["duplicates"]["phash"] is None

    work.recipe["safety"] = {"phash": {"mode": "report", "bits": 4}}
    assert work.run() == 0
    rows = pool_rows(work)
    wanted = expected(work, rows, 4)
    assert told(rows) == wanted
    unknown = {"astronaut-small.png", "chelsea-small.png", "coffee-small.png"}
    assert len(wanted) == 4
    assert unknown < set(wanted)
    assert decisions(rows) == decisions(plain)
    assert manifest_hash(work.run_folder) == was
    assert counts(work.run_folder, "embed")["phash_duplicates"] == len(wanted)
    assert report(work)["duplicates"]["phash"] == {
        "mode": "report",
        "bits": 4,
        "images": len(wanted),
    }

    work.recipe["safety"]["phash"]["mode"] = "drop"
    assert work.run() == 0
    rows = pool_rows(work)
    assert told(rows) == wanted
    by_hash = {
        key: ("duplicate", f"duplicate_of {wanted[key][0]} phash {wanted[key][1]} bits")
        for key in unknown
    }
    assert decisions(rows) == decisions(plain) | by_hash
    assert report(work)["funnel"]["duplicates"] == 1 + len(wanted)
    page = (work.run_folder / "report" / "report.html").read_text()
    assert "by its hash" in page
    assert "count as its duplicates" in page


def test_a_distance_is_tried_without_embedding_again(project: Callable[..., Project]) -> None:
    work = photographs(project)
    found = []
    for bits in (0, 10):
        work.recipe["safety"] = {"phash": {"bits": bits}}
        assert work.run() == 0
        rows = pool_rows(work)
        found.append(told(rows))
        assert found[-1] == expected(work, rows, bits)
    assert set(found[0]) < set(found[1])
    embed = counts(work.run_folder, "embed")
    assert (embed["computed"], embed["reused"]) == (0, 2 + 1)


def test_images_of_one_colour_stay_apart(project: Callable[..., Project]) -> None:
    work = project(pool=[], dedup={"min_cosine": 0.99}, safety={"phash": {"mode": "drop"}})
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (64, 64), colour).save(work.folder / "pool" / f"flat-{number}.png")
    assert work.run() == 0
    assert all(row["decision"] != "duplicate" for row in pool_rows(work))
    assert len(pq.read_table(work.run_folder / "embed" / "phash.parquet")) == 0


def test_one_of_three_stays_where_hash_and_descriptor_link_two_each(
    project: Callable[..., Project],
) -> None:
    work = project(pool=[], dedup={"min_cosine": 0.99}, safety={"phash": {"mode": "drop"}})
    pool = work.folder / "pool"
    image = Image.fromarray(skimage.data.rocket()).convert("RGB")
    grey = ImageOps.grayscale(image).reduce(2)
    blocks = grey.resize((6, 6), Image.Resampling.BOX).resize((700, 700), Image.Resampling.NEAREST)
    for name, one in (("colour", image), ("grey", grey), ("blocks", blocks)):
        one.save(pool / f"{name}.png")
    assert work.run() == 0
    rows = {row["key"]: row for row in pool_rows(work)}
    stays = rows["blocks.png"]["id"]
    assert rows["blocks.png"]["decision"] != "duplicate"
    assert rows["grey.png"]["phash_duplicate_of"] == rows["colour.png"]["id"]
    assert rows["grey.png"]["reason"] == f"duplicate_of {stays} cosine 1.000"
    assert rows["colour.png"]["reason"] == f"duplicate_of {stays} by its duplicate group"
