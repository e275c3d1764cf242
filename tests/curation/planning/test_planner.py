"""The plan: sums that are known, what grows with what, and one clear line for a mistake."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from workbench import Project

from curation import pipeline
from curation.algorithms import knn
from curation.cli import main
from curation.images.effort import semantic_effort
from curation.planning import composition, constants, planner
from curation.planning.constants import Constants
from curation.planning.job import Job
from curation.planning.search import Ask, Sent, search
from curation.recipe import load
from curation.stages import neighbour_index, neighbours

PRESET = Path(__file__).resolve().parents[3] / "recipes" / "lvd142m.yaml"
PAPER = ["--images", "1.2e9", "--nodes", "20", "--gpus", "8", "--gpu", "v100"]


@pytest.fixture(scope="module")
def c() -> Constants:
    return constants.shipped()


def job(c: Constants, *overrides: str, pool: int = 1_200_000_000) -> Job:
    recipe = load(PRESET, list(overrides))
    found = composition.sizes(recipe, pipeline.ingest_config(recipe), pool)
    return Job.of(recipe, found, c)


def plans(c: Constants, nodes: int, *overrides: str, pool: int = 10_000_000) -> dict[str, Any]:
    recipe = load(PRESET, list(overrides))
    found = composition.sizes(recipe, pipeline.ingest_config(recipe), pool)
    on = planner.hardware(c, nodes, None, 8, "v100", recipe.encoder.precision)
    return {stage.name: stage for stage in planner.plan(recipe, found, c, on)}


def test_every_constant_says_where_it_comes_from(c: Constants) -> None:
    assert len(c.values) > 40
    assert set(c.sources) == set(c.values)
    assert all(len(source) > 10 for source in c.sources.values())
    assert all(len(gpu.source) > 10 for gpu in c.gpus.values())


def test_flop_are_those_that_are_published() -> None:
    """ViT-S/16: 4.6 GMAC, ViT-L/16: 61.6 (timm's tables)."""
    assert semantic_effort("vit_small_patch16_224").flop == pytest.approx(2 * 4.6e9, rel=0.01)
    assert semantic_effort("vit_large_patch16_224").flop == pytest.approx(2 * 61.6e9, rel=0.01)
    assert semantic_effort("vit_large_patch16_224").dim == 1024


def test_embedding_on_gpus_by_hand(c: Constants) -> None:
    """10 million images on 8 V100: ViT-L in fp16, SSCD in fp32, both limited by the GPUs."""
    stage = plans(c, 1)["embed"]
    (step,) = [timed for timed in stage.steps if timed.step.where == "gpus"]
    images = 10_000_000 + sum(one.images or 0 for one in _sets())
    gpu = c.gpu("v100")
    each = 123.1e9 / (gpu.tflops["fp16"] * 1e12) + 16.8e9 / (gpu.tflops["fp32"] * 1e12)
    assert step.limit == "GPUs"
    assert step.seconds == pytest.approx(images * each / 8, rel=0.02)


def _sets() -> list[Any]:
    sources = load(PRESET).sources
    return [*sources.curated.values(), *sources.holdout.values()]


def test_more_nodes_help_workers_and_not_the_driver(c: Constants) -> None:
    few, many = plans(c, 1), plans(c, 4)
    for name in planner_stages(few):
        for before, after in zip(few[name].steps, many[name].steps, strict=True):
            if before.step.where == "driver":
                assert after.seconds == pytest.approx(before.seconds)
            else:
                assert after.seconds <= before.seconds
    assert many["embed"].seconds < few["embed"].seconds / 3


def planner_stages(found: dict[str, Any]) -> tuple[str, ...]:
    assert tuple(found) == pipeline.STAGES
    return pipeline.STAGES


def test_requests_only_cost_time_on_s3(c: Constants) -> None:
    remote, local = plans(c, 4), plans(c, 4, "output=/mnt/run")
    assert sum(s.seconds for s in local.values()) < sum(s.seconds for s in remote.values())
    limits = {timed.limit for stage in local.values() for timed in stage.steps}
    assert "S3 requests" not in limits


def test_perceptual_hashes_are_sorted_by_the_driver_where_they_are_asked_for(c: Constants) -> None:
    asked = 'safety={"phash": {"bits": 4}}'
    without, few = plans(c, 1)["embed"], plans(c, 1, asked)["embed"]
    many = plans(c, 1, asked, pool=1_000_000_000)["embed"]
    (step,), (more,) = (
        [timed for timed in stage.steps if timed.step.name == "compare hashes"]
        for stage in (few, many)
    )
    assert len(few.steps) == len(without.steps) + 1
    assert step.step.where == "driver"
    assert step.step.memory == 30 * 10_000_000
    assert more.seconds > 100 * step.seconds  # and more often, too


def test_a_search_is_counted_as_the_stage_cuts_it(c: Constants) -> None:
    ask = Ask("copies", 1_200_000_000, 1_200_000_000, 512, 10.0, itself=True)
    one = job(c)
    sent = Sent.of(one, ask, ask.queries)
    assert sent.cells == knn.cell_count(ask.base, ask.queries) == 73_484
    assert sent.buckets == -(-ask.base // neighbour_index.BUCKET_ROWS)
    assert sent.base_chunks == neighbours.MOST_CHUNKS
    assert sent.waves == 1
    waves = Sent.of(job(c, "search.spill_bytes=200_000_000_000"), ask, ask.queries).waves
    assert waves == -(-int(sent.copy_bytes) // 200_000_000_000)
    (exact,) = search(one, Ask("holdout", 1000, 150_000, 512, 10.0))
    assert exact.seconds > 2 * 512 * 1000 * 150_000 / (c["exact_gflops"] * 1e9)


def test_sets_that_search_or_draw_share_one_pass_over_the_pool(c: Constants) -> None:
    names = [timed.step.name for timed in plans(c, 4)["retrieve"].steps]
    assert names.count("the pool: put the base in cells") == 1
    assert sum(name.endswith(": answer") for name in names) == 3  # a sampled set each
    assert names.count("candidates to draw") == 1


def test_the_store_itself_bounds_how_fast_any_number_of_nodes_read(c: Constants) -> None:
    stage = plans(c, 500)["shards"]
    (step,) = [timed for timed in stage.steps if timed.step.name == "write shards"]
    assert step.limit == "S3 itself"
    assert step.seconds == pytest.approx((step.step.gets + step.step.puts) / c["s3_requests_per_s"])


def test_on_processors_the_encoder_has_the_rate_of_its_precision(c: Constants) -> None:
    measured = c.updated({"forward_fp32_gflops": 40.0, "forward_bf16_gflops": 160.0})
    seconds = {}
    for precision in ("fp32", "bf16"):
        recipe = load(PRESET, [f"encoder.precision={precision}", "output=/mnt/run"])
        found = composition.sizes(recipe, pipeline.ingest_config(recipe), 10_000_000)
        on = planner.hardware(measured, 1, 8, 0, None, precision)
        embed = planner.plan(recipe, found, measured, on)[1]
        seconds[precision] = embed.slowest.seconds
    images = 10_000_000 + sum(one.images or 0 for one in _sets())
    saved = images * 123.1e9 * (1 / 40e9 - 1 / 160e9) / 8
    assert seconds["fp32"] - seconds["bf16"] == pytest.approx(saved, rel=0.02)


def test_the_paper_s_run_is_printed_with_its_bottleneck(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(PRESET), *PAPER, "--sources"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    hours = {name: float(rows[name][1]) for name in pipeline.STAGES}
    assert float(rows["total"][1]) == pytest.approx(sum(hours.values()), abs=0.05)
    worst = max(hours, key=lambda name: hours[name])
    assert f"The bottleneck is {worst}, " in out
    assert "1,200,000,000 pool images on 20 x 48 cores, 20 x 8 V100" in out
    assert "Megatron-LM" in out


def test_what_was_measured_here_replaces_what_was_shipped(tmp_path: Path, c: Constants) -> None:
    path = tmp_path / "machine.yaml"
    path.write_text(constants.dump({"forward_fp32_gflops": 123.456789}, "a test of this machine"))
    over = constants.load(str(path))
    assert over["forward_fp32_gflops"] == 123.5
    assert over.sources["forward_fp32_gflops"] == "a test of this machine"
    assert over["prepare_s"] == c["prepare_s"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--images", "0"], "--images 0: must be a number of at least 1, as in 1.2e9"),
        (["--images", "-5"], "--images -5: must be a number of at least 1"),
        (["--images", "many"], "--images many: must be a number of at least 1"),
        (["--images", "nan"], "--images nan: must be a number of at least 1"),
        (["--gpus", "8", "--gpu", "v10"], "--gpu v10: not known; did you mean 'v100'? (known: a1"),
        (["--gpus", "8"], "--gpus and --gpu belong together; --gpu NAME is missing"),
        (["--gpu", "v100"], "--gpus and --gpu belong together; --gpus NUMBER is missing"),
        (["--nodes", "0"], "--nodes 0: must be at least 1"),
        (["--cores", "0"], "--cores 0: must be at least 1"),
        (
            ["--gpus", "8", "--gpu", "v100", "--set", "encoder.precision=bf16"],
            "encoder.precision: v100 has no bf16 (it has fp16, fp32); try --set encoder.precision=",
        ),
        (["--set", "encoder.model=vit_nothing"], "encoder.model: timm has no model 'vit_nothing'"),
        (["--constants", "/no/file"], "--constants /no/file: can't be read: "),
    ],
)
def test_a_mistake_gets_one_clear_line(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(PRESET), *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"curate: {said}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("constants: {descriptor_gflop: {value: 1, source: x}}", "no such constant; did you mean"),
        ("constants: {prepare_s: 3}", "constants.prepare_s: must be {value: NUMBER, source: TEXT}"),
        ("constants: {prepare_s: {value: -1, source: x}}", "constants.prepare_s: must be"),
        ("gpus: {t4: {tflops: {fp16: 1}}}", "gpus.t4: must be a mapping of tflops, gpus, cores"),
        ("[1]", "must be a mapping of constants and gpus"),
        ("a: b: c", "not valid YAML"),
    ],
)
def test_a_faulty_file_of_constants_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.yaml"
    path.write_text(text)
    with pytest.raises(constants.RecipeError, match=str(path)) as error:
        constants.load(str(path))
    assert said in str(error.value)


def test_a_plan_of_a_folder_needs_no_declared_sizes(
    project: Callable[..., Project], capsys: pytest.CaptureFixture[str]
) -> None:
    made = project(pool=range(30))
    made.recipe["encoder"] = {"model": "lvd_demo"}
    assert main(["plan", str(made.path), "--cores", "2"]) == 0
    out = capsys.readouterr().out
    assert "30 pool images on 1 x 2 cores" in out
    assert "The bottleneck is embed" in out


def test_the_shipped_file_is_plain_yaml(c: Constants) -> None:
    folder = Path(constants.__file__).parent
    data = yaml.safe_load((folder / constants.SHIPPED).read_text())
    assert set(data["constants"]) == set(c.values)
    v100 = c.gpu("v100")
    assert replace(v100, name="x").tflops == data["gpus"]["v100"]["tflops"]
