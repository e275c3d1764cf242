"""The dry run: what a recipe's sets take, against Table 15 of DINOv2 and against real folders."""

from collections.abc import Callable
from pathlib import Path

import pytest
from workbench import Project

from curation import pipeline
from curation.cli import main
from curation.planning import composition
from curation.recipe import load

PRESET = Path(__file__).resolve().parents[3] / "recipes" / "lvd142m.yaml"
TOTAL = 142_109_386

# Table 15: set -> (its images, retrieved, final); sets that are taken twice have two rows.
TABLE_15 = {
    "imagenet-22k": [(14_197_086, 14_197_086, 14_197_086), (14_197_086, 56_788_344, 56_788_344)],
    "imagenet-1k": [(1_281_167, 40_997_344, 40_997_344)],
    "caltech-101": [(3_030, 2_630_000, 1_000_000)],
    "cub-200": [(5_994, 1_300_000, 1_000_000)],
    "dtd": [(1_880, 1_580_000, 1_000_000)],
    "fgvc-aircraft": [(3_334, 1_170_000, 1_000_000)],
    "flowers-102": [(1_020, 1_060_000, 1_000_000)],
    "food-101": [(75_750, 21_670_000, 1_000_000)],
    "oxford-pets": [(3_680, 2_750_000, 1_000_000)],
    "stanford-cars": [(8_144, 7_220_000, 1_000_000)],
    "sun397": [(19_850, 18_950_000, 1_000_000)],
    "voc-2007": [(2_501, 1_010_000, 1_000_000)],
    "ade20k": [(20_210, 20_720_000, 1_000_000)],
    "cityscapes": [(2_975, 1_390_000, 1_000_000)],
    "voc-2012-seg": [(1_464, 10_140_000, 1_000_000)],
    "mapillary-sls": [(1_434_262, 1_434_262, 1_434_262)],
    "kitti": [(23_158, 3_700_000, 1_000_000)],
    "nyu-depth-v2": [(24_231, 10_850_000, 1_000_000)],
    "sun-rgbd": [(4_829, 4_870_000, 1_000_000)],
    "gldv2": [(1_580_470, 1_580_470, 1_580_470), (1_580_470, 6_321_880, 6_321_880)],
    "amstertime-new": [(1_231, 960_000, 960_000)],
    "amstertime-old": [(1_231, 830_000, 830_000)],
    "met": [(397_121, 62_860_000, 1_000_000)],
    "roxford": [(4_993, 3_680_000, 1_000_000)],
    "rparis": [(6_322, 3_660_000, 1_000_000)],
}


def shares_of(path: Path, pool: int | None = None) -> list[composition.Share]:
    recipe = load(path)
    found = composition.sizes(recipe, pipeline.ingest_config(recipe), pool)
    return composition.shares(recipe, found)


def test_the_preset_is_table_15_set_by_set() -> None:
    rows: dict[str, list[tuple[int, int, int]]] = {}
    for share in shares_of(PRESET):
        rows.setdefault(share.set, []).append((share.images, share.asked, share.taken))
    assert list(rows.items()) == list(TABLE_15.items())
    assert sum(final for sets in TABLE_15.values() for *_, final in sets) == TOTAL


def test_the_command_prints_it_with_its_total(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(PRESET)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("capped at 1,000,000" in line for line in lines) == 19
    total, _ = [line for line in lines if line.startswith("total")]  # of images, and of hours
    assert total.split()[1] == f"{TOTAL:,}"
    (voc,) = [line for line in lines if line.startswith("voc-2012-seg")]
    assert voc.endswith("1,464 images put 4 in at most 366 clusters")


def test_the_expectation_is_for_the_plan_alone() -> None:
    """Else a better guess would run the stage again."""
    recipe = load(PRESET)
    other = load(PRESET, ["sources.curated.dtd.retrieve.0.cluster.expected_clusters=9"])
    assert pipeline._sets(recipe) == pipeline._sets(other)


def test_sets_without_a_size_are_listed(project: Callable[..., Project]) -> None:
    made = project(pool=range(30), curated=range(100, 108))
    source = made.recipe["sources"]["curated"]["wanted"]
    source["retrieve"] = [
        "as_is",
        {"sample": {"k": 3}},
        {"cluster": {"per_cluster": 10, "cap": 15}},
    ]
    rows = [(share.images, share.asked, share.taken) for share in shares_of(made.path)]
    assert rows == [(8, 8, 8), (8, 24, 24), (8, 20, 15)]  # 8 images: 4 in at most 2 clusters


def test_every_missing_size_is_named(
    project: Callable[..., Project], capsys: pytest.CaptureFixture[str]
) -> None:
    made = project()
    made.recipe["sources"]["pool"] = [{"uri": "/no/pool"}, {"uri": "/no/more", "images": 7}]
    made.recipe["sources"]["curated"]["wanted"]["uri"] = "/no/set"
    assert main(["plan", str(made.path)]) == 2
    said = capsys.readouterr().err
    assert "sources.pool.0.images: is missing, and sources.pool.0.uri: /no/pool: no such" in said
    assert "sources.curated.wanted.images: is missing, and" in said
    assert "pool.1" not in said
    made.recipe["sources"]["curated"]["wanted"]["images"] = 5
    assert [share.taken for share in shares_of(made.path, pool=100)] == [5, 20]
