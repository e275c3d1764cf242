"""A recipe's faults, all at once: where, what was given, what is allowed, the nearest key."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from workbench import Project

from curation.recipe import Recipe, RecipeError, dump, load, parse


def recipe(**changes: Any) -> dict[str, Any]:
    sources = {"pool": [{"uri": "/data/pool"}], "curated": {"cats": {"uri": "/data/cats"}}}
    return {"name": "mine", "output": "/runs/mine", "sources": sources, **changes}


def curated(**changes: Any) -> dict[str, Any]:
    sources = recipe()["sources"]
    sources["curated"]["cats"] |= changes
    return recipe(sources=sources)


def pool(*entries: Any) -> dict[str, Any]:
    return recipe(sources={**recipe()["sources"], "pool": list(entries)})


def faults(data: dict[str, Any], *overrides: str) -> list[str]:
    """The message's lines below its first."""
    with pytest.raises(RecipeError) as error:
        parse(yaml.safe_dump(data), "r.yaml", list(overrides))
    first, *lines = str(error.value).split("\n")
    assert first == f"r.yaml: {len(lines)} fault{'s' if len(lines) > 1 else ''}"
    return [line.removeprefix("  ") for line in lines]


def read(text: str, *overrides: str) -> Recipe:
    return parse(text, "r.yaml", list(overrides))


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (recipe(dedupe={}), "dedupe: no such key; did you mean 'dedup'? (allowed: name, output, "),
        (recipe(zzz=1), "zzz: no such key (allowed: name, output, seed, sources, images, "),
        (recipe(name="a b"), "name: must be letters, digits, '.', '_' and '-', at most 64, got "),
        (recipe(name="x\n"), "name: must be letters, digits, "),
        (recipe(name=7), "name: must be text, got 7"),
        (recipe(output=""), "output: must be a local path or s3://bucket/prefix, got ''"),
        (recipe(output="gs://b/x"), "output: must be a local path or s3://bucket/prefix, got "),
        (recipe(output="a\0b"), "output: must be a local path or s3://bucket/prefix, got "),
        (recipe(seed=-1), "seed: must be greater than or equal to 0, got -1"),
        (recipe(seed="x"), "seed: must be a valid integer, unable to parse string as an integer, "),
        (recipe(images={"min_side": True}), "images.min_side: true and false (and yes, no, on, "),
        (recipe(images={"min_sied": 3}), "images.min_sied: no such key; did you mean 'min_side'?"),
        (recipe(images={"max_aspect": float("nan")}), "images.max_aspect: must be greater than "),
        (recipe(images=3), "images: must be a mapping of min_side, max_pixels, max_bytes, max_asp"),
        (recipe(encoder={"precision": "fp64"}), "encoder.precision: must be 'fp32', 'bf16' or 'f"),
        (recipe(encoder={"compile": "often"}), "encoder.compile: must be a valid boolean, unable"),
        (recipe(encoder={"decoder": "gpu"}), "encoder.decoder: must be 'pillow' or 'nvjpeg', got"),
        (
            recipe(encoder={"decoder": "nvjpeg"}, safety={"phash": {}}),
            "safety: phash can't be had with encoder.decoder: nvjpeg; write `pillow` there, or "
            "leave it out",
        ),
        (
            recipe(encoder={"decoder": "nvjpeg"}, safety={"phash": {}, "filter": {"weights": "x"}}),
            "safety: filter and phash can't be had with encoder.decoder: nvjpeg; write `pillow` "
            "there, or leave them out",
        ),
        (recipe(dedup={"min_cosine": 2}), "dedup.min_cosine: must be less than or equal to 1, got"),
        (recipe(failures={"max_share": -0.1}), "failures.max_share: must be greater than or equal"),
        (recipe(sources=3), "sources: must be a mapping of pool, curated, holdout, got 3"),
        (pool(), "sources.pool: must not be empty, got []"),
        (pool("/data"), "sources.pool.0: must be a mapping of uri, format, images, "),
        (pool({"url": "x", "uri": "y"}), "sources.pool.0.url: no such key; did you mean 'uri'?"),
        (pool({}), "sources.pool.0.uri: is missing"),
        (pool({"uri": "x", "format": "zip"}), "sources.pool.0.format: must be 'folder', 'webdatas"),
        (
            pool({"uri": "x", "images": 0}),
            "sources.pool.0.images: must be greater than or equal to 1",
        ),
        (pool({"uri": "/runs/mine"}), "sources: /runs/mine and the output /runs/mine must lie ap"),
        (pool({"uri": "/runs/mine/x/"}), "sources: /runs/mine/x/ and the output /runs/mine must "),
        (pool({"uri": "/runs"}), "sources: /runs and the output /runs/mine must lie apart"),
        (pool({"uri": "/data/../runs/./"}), "sources: /data/../runs/./ and the output /runs/mine"),
        (curated(retrieve=[]), "sources.curated.cats.retrieve: must not be empty, got []"),
        (curated(retrieve="as_is"), "sources.curated.cats.retrieve: must be a list, got 'as_is'"),
        (
            curated(retrieve=["sampel"]),
            "sources.curated.cats.retrieve.0: must be as_is, {sample: {k: 4}}, {cluster: "
            "{per_cluster: 10000}} or {hierarchical: {target_size: 1000000}}; did you mean "
            "'sample'?, got 'sampel'",
        ),
        (
            curated(retrieve=[{"clutser": {}}]),
            "sources.curated.cats.retrieve.0.clutser: no such key; did you mean 'cluster'? (allo",
        ),
        (
            curated(retrieve=["hierarchcal"]),
            "sources.curated.cats.retrieve.0: must be as_is, {sample: {k: 4}}, {cluster: "
            "{per_cluster: 10000}} or {hierarchical: {target_size: 1000000}}; did you mean "
            "'hierarchical'?, got 'hierarchcal'",
        ),
        (
            curated(retrieve=[{"hierarchical": {"level": 3}}]),
            "sources.curated.cats.retrieve.0.hierarchical.level: no such key; did you mean 'level",
        ),
        (
            curated(retrieve=[{"hierarchical": {"target_size": 0}}]),
            "sources.curated.cats.retrieve.0.hierarchical.target_size: must be greater than or eq",
        ),
        (
            curated(retrieve=[{"hierarchical": 5}]),
            "sources.curated.cats.retrieve.0.hierarchical: must be a mapping of levels, ta",
        ),
        (
            curated(retrieve=[{"sample": {"kk": 3}}]),
            "sources.curated.cats.retrieve.0.sample.kk: no such key; did you mean 'k'? (allowed:",
        ),
        (
            curated(retrieve=[{"sample": {"k": 0}}]),
            "sources.curated.cats.retrieve.0.sample.k: must be greater than or equal to 1, got 0",
        ),
        (
            curated(retrieve=[{"sample": {}, "as_is": True}]),
            "sources.curated.cats.retrieve.0: must hold exactly one of as_is, sample, cluster, ",
        ),
        (curated(retrieve=[{"as_is": False}]), "sources.curated.cats.retrieve.0.as_is: must be Tr"),
        (curated(retrieve=[5]), "sources.curated.cats.retrieve.0: must be a mapping of as_is, "),
        (curated(retrieve=["as_is"] * 2), "sources.curated.cats.retrieve: names the same mode tw"),
        (
            recipe(safety={"phash": {"mode": "of"}}),
            "safety.phash.mode: must be 'report' or 'drop', ",
        ),
        (
            recipe(safety={"phash": {"bits": 11}}),
            "safety.phash.bits: must be less than or equal to",
        ),
        (
            recipe(safety={"phash": {"bit": 4}}),
            "safety.phash.bit: no such key; did you mean 'bits'",
        ),
        (
            recipe(safety={"phash": "drop"}),
            "safety.phash: must be a mapping of mode, bits, got 'dr",
        ),
        (recipe(safety={"pash": {}}), "safety.pash: no such key; did you mean 'phash'? (allowed: "),
        (
            recipe(sources={**recipe()["sources"], "curated": {"a b": {"uri": "/x"}}}),
            "sources.curated.a b: must be letters, digits, '.', '_' and '-', at most 64, got 'a b'",
        ),
        (
            recipe(sources={**recipe()["sources"], "holdout": {"../x": {"uri": "/x"}}}),
            "sources.holdout.../x: must be letters, ",
        ),
    ],
)
def test_one_fault_is_one_line(data: dict[str, Any], line: str) -> None:
    (found,) = faults(data)
    assert found.startswith(line)


@pytest.mark.parametrize(
    "levels",
    [0, 11, -1, 2.0, "3", "many", {"a": 1}, [], [5, 5], [5, 50], [5, 1], [5.0], ["5"], [5, [4]]],
)
def test_levels_that_are_none(levels: Any) -> None:
    (found,) = faults(curated(retrieve=[{"hierarchical": {"levels": levels}}]))
    assert found.startswith(
        "sources.curated.cats.retrieve.0.hierarchical.levels: must be a number of levels from 1 to"
        " 10, or the cluster counts of the levels above the first, falling to 2 or more, as in"
        " [1000, 100], got "
    )


def test_levels_are_no_truth_value() -> None:
    (found,) = faults(curated(retrieve=[{"hierarchical": {"levels": True}}]))
    assert found.startswith("sources.curated.cats.retrieve.0.hierarchical.levels: true and false")


def test_truth_values_are_taken_where_they_are_meant() -> None:
    assert parse(yaml.safe_dump(recipe(encoder={"compile": True})), "r.yaml", []).encoder.compile
    (found,) = faults(recipe(encoder={"compile": "perhaps"}))
    assert found.startswith("encoder.compile: must be ")
    (found,) = faults(recipe(encoder={"batch": True}))
    assert found.startswith("encoder.batch: true and false")


@pytest.mark.parametrize(
    ("levels", "k", "counts", "least"),
    [
        (1, 1, (), 1),
        (2, 3, (2,), 3),
        (2, 1000, (100,), 3),
        (3, 30, (3, 2), 30),
        (4, 300, (30, 3, 2), 300),
        (3, 100_000, (10_000, 1000), 30),
        ([5000, 500], 5001, (5000, 500), 5001),
    ],
)
def test_levels_need_enough_clusters_below_them(
    levels: Any, k: int, counts: tuple[int, ...], least: int
) -> None:
    data = curated(retrieve=["as_is", {"hierarchical": {"levels": levels}}])
    mode = read(yaml.safe_dump(data | {"cluster": {"k": k}})).sources.curated["cats"].hierarchical
    assert mode is not None
    assert mode.counts(k) == counts
    if least > 1:
        (found,) = faults(data | {"cluster": {"k": least - 1}})
        place = "sources.curated.cats.retrieve.1.hierarchical.levels"
        assert (
            found == f"cluster: k must be at least {least} for {place}: {levels}, got {least - 1}"
        )


def test_the_default_number_of_clusters_is_checked_against_the_levels_too() -> None:
    data = curated(retrieve=[{"hierarchical": {"levels": [200_000]}}])
    data["sources"]["curated"]["dogs"] = {
        "uri": "/d",
        "retrieve": [{"hierarchical": {"levels": 7}}],
    }
    place = "sources.curated.dogs.retrieve.0.hierarchical.levels"
    assert faults(data) == [f"cluster: k must be at least 300000 for {place}: 7, got 100000"]
    assert len(faults(data | {"seed": -1})) == 2


def test_all_faults_are_listed_at_once() -> None:
    data = pool({"uri": "gs://x", "format": "tar"}, {"url": "x"})
    data |= {"seed": -1, "shards": {"images_per_shard": 0}, "dedupe": {}, "name": "a/b"}
    data["sources"]["curated"]["b c"] = {"uri": "/x", "retrieve": ["simple"]}
    del data["output"]
    assert [line.partition(":")[0] for line in faults(data)] == [
        "name",
        "output",
        "seed",
        "sources.pool.0.uri",
        "sources.pool.0.format",
        "sources.pool.1.uri",
        "sources.pool.1.url",
        "sources.curated.b c",
        "sources.curated.b c.retrieve.0",
        "shards.images_per_shard",
        "dedupe",
    ]


def test_a_source_within_the_output_is_told_beside_other_faults() -> None:
    assert len(faults(recipe(output="/data", seed=-1))) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "r.yaml: a recipe is a mapping"),
        ("- a", "r.yaml: a recipe is a mapping"),
        ("just text", "r.yaml: a recipe is a mapping"),
        ("name: x\nsources: [", "r.yaml: line 2, not valid YAML: "),
        ("name: x\n\tseed: 1", "r.yaml: line 2, not valid YAML: "),
        ("name: *other", "r.yaml: line 1, not valid YAML: found undefined alias"),
        ("a: !!python/object:os.system x", "r.yaml: line 1, not valid YAML: could not determine"),
        ("name: \0", "r.yaml: not valid YAML: unacceptable character"),
        ("name: a\nname: b", "r.yaml: line 2: 'name' is given twice"),
        ("a:\n  b: 1\n  c: 2\n  b: 3", "r.yaml: line 4: 'b' is given twice"),
        ("[1]: 2", "r.yaml: line 1: a key must be text"),
        ("? {a: 1}\n: 2", "r.yaml: line 1: a key must be text"),
    ],
)
def test_yaml_mistakes_tell_their_line(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        read(text)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("nothing", "--set nothing: write it as path=value"),
        ("=3", "--set =3: write it as path=value"),
        ("seed=[", "--set seed=[: the value is not valid YAML"),
        ("sources.pool.7.uri=x", "there is no place 'sources.pool.7.uri' in the recipe"),
        ("sources.pool.x.uri=x", "there is no place 'sources.pool.x.uri' in the recipe"),
        ("name.first=x", "there is no place 'name.first' in the recipe"),
        ("dedup.min_cosin=0.7", "dedup.min_cosin: no such key; did you mean 'min_cosine'?"),
        ("dedup.min_cosine=x", "dedup.min_cosine: must be a valid number"),
    ],
)
def test_a_wrong_override_is_named(override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        read(yaml.safe_dump(recipe()), override)


def test_overrides_reach_lists_sections_and_names() -> None:
    changes = ("sources.pool.0.uri=/other", "dedup.min_cosine=0.7", "seed=5", "encoder.batch=3")
    found = read(yaml.safe_dump(recipe()), *changes)
    assert (found.sources.pool[0].uri, found.dedup.min_cosine) == ("/other", 0.7)
    assert (found.seed, found.encoder.batch) == (5, 3)


def test_what_is_left_empty_has_its_defaults() -> None:
    data = curated(retrieve=["as_is", {"sample": None}]) | {"search": None, "dedup": None}
    data["sources"]["holdout"] = None
    found = read(yaml.safe_dump(data))
    plain = read(yaml.safe_dump(recipe()))
    assert (found.search, found.dedup) == (plain.search, plain.dedup)
    assert found.sources.curated["cats"].sample == plain.sources.curated["cats"].sample


def test_yaml_merges_are_no_duplicate_keys() -> None:
    text = yaml.safe_dump(recipe()) + "images: &a {min_side: 64}\nshards:\n  <<: {}\n"
    assert read(text).images.min_side == 64


def test_the_resolved_recipe_reads_back_as_itself() -> None:
    above = {"hierarchical": {"levels": [500, 50]}}
    modes = ["as_is", "sample", {"cluster": {"cap": 9}}, above]
    found = read(yaml.safe_dump(curated(retrieve=modes)))
    assert read(dump(found)) == found
    plain = read(yaml.safe_dump(curated(retrieve=["hierarchical"])))
    assert read(dump(plain)) == plain


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("none", "binary", "."):
        with pytest.raises(RecipeError) as error:
            load(tmp_path / name)
        assert str(tmp_path) in str(error.value)


def test_a_link_into_the_output_does_not_hide_it(tmp_path: Path) -> None:
    (tmp_path / "run" / "shards").mkdir(parents=True)
    (tmp_path / "pool").symlink_to(tmp_path / "run" / "shards")
    data = pool({"uri": str(tmp_path / "pool")}) | {"output": str(tmp_path / "run")}
    assert "must lie apart" in faults(data)[0]


@pytest.mark.parametrize(
    ("section", "value", "said"),
    [
        ("encoder", {"model": "vit_bas_patch16_224"}, "encoder.model: timm has no model"),
        ("encoder", {"model": "test_vit", "weights": "/none.bin"}, "encoder.weights: /none.bin: "),
        ("encoder", {"model": "test_vit", "weights": "{junk}"}, "encoder.weights: neither a safet"),
        ("encoder", {"model": "test_vit2"}, "encoder.weights: not the weights of timm's test_vit2"),
        ("encoder", {"model": "test_vit", "weights": "hub"}, "encoder.weights: hub: 'test_vit' ca"),
        ("encoder", {"weights": "{junk}/.."}, "encoder.weights: "),
        ("copy_descriptor", {"weights": "{junk}"}, "copy_descriptor.weights: not a TorchScript fi"),
        ("copy_descriptor", {"weights": "/none"}, "copy_descriptor.weights: /none: no such file"),
        ("copy_descriptor", {"weights": "s3:"}, "copy_descriptor.weights: "),
    ],
)
def test_a_model_that_cannot_be_used_is_one_clear_line(
    project: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    section: str,
    value: dict[str, str],
    said: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    work: Project = project(pool=range(2), curated=range(100, 102))
    junk = work.folder / "junk.bin"
    junk.write_bytes(os.urandom(2000))
    given = {name: text.replace("{junk}", str(junk)) for name, text in value.items()}
    work.recipe[section] = {**work.recipe[section], **given}
    assert work.run() == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("curate: ")]
    assert lines == [line for line in lines if said in line]
    assert len(lines) == 1
    assert "Traceback" not in error
