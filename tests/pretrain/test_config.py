"""What is wrong with a config is said in lines that name the settings, all at once."""

from dataclasses import replace

import pytest
import torch

from pretrain.config import Config, load, shipped, with_settings
from pretrain.errors import UserError
from pretrain.student_teacher import StudentTeacher
from pretrain.train import images_per_batch


def faults(*settings: str) -> list[str]:
    """What is wrong with `demo` and the settings."""
    with pytest.raises(UserError) as raised:
        load("demo", settings)
    first, *lines = str(raised.value).splitlines()
    assert first == "demo:"
    return [line.strip() for line in lines]


@pytest.mark.parametrize(
    "setting",
    [
        "model.patch_size=0",
        "model.width=0",
        "model.heads=0",
        "model.depth=0",
        "model.registers=-1",
        "model.image_size=4",
        "model.drop_path=1.5",
        "model.drop_path=-0.1",
        "model.ffn_ratio=0",
        "objective.dino_head.layers=0",
        "objective.dino_head.prototypes=0",
        "objective.sinkhorn_iterations=0",
        "objective.student_temperature=0",
        "objective.center_momentum=1.1",
        "objective.koleo_weight=-1",
        "crops.global_size=4",
        "crops.local_crops=-1",
        "crops.local_scale=[0.5,0.1]",
        "crops.global_scale=[0,1]",
        "crops.blur=none",
        "masks.probability=-1",
        "masks.probability=2",
        "masks.least_ratio=0.9",
        "schedule.iterations=0",
        "schedule.batch=0",
        "schedule.warmup=-5",
        "schedule.temperature_warmup=-1",
        "schedule.momentum=2",
        "schedule.teacher_temperature=0",
        "schedule.base_lr=.inf",
        "schedule.base_lr=.nan",
        "optimizer.betas=[2,2]",
        "optimizer.clip=-1",
        "optimizer.most_skipped=0",
        "data.window=0",
        "data.seed=-1",
        "data.workers=-1",
        "data.max_bad_share=1.5",
        "parallel.accumulate=0",
        "watch.keep=-1",
        "watch.keep=0",
        "watch.log_every=-1",
    ],
)
def test_a_value_out_of_range_is_named(setting: str) -> None:
    found = faults(setting)
    assert all(line.startswith(setting.partition("=")[0]) for line in found), found


def test_all_faults_are_told_at_once() -> None:
    found = faults(
        *("schedule.batch=none", "schedule.warmup=900", "model.heads=7", "model.widht=3"),
        *("crops.global_size=33", "crops.local_scale=[2,1]", "data.window=0"),
    )
    assert [line.split(" ")[0].rstrip(":") for line in sorted(found)] == [
        *("crops.global_size", "crops.local_scale", "data.window", "model.heads", "model.widht"),
        *("schedule.batch", "schedule.warmup"),
    ]


def test_what_concerns_a_wrong_setting_is_told_once() -> None:
    """112 pixels are no multiple of the default patch size, which nobody asked for."""
    assert faults("model.patch_size=none", "crops.local_size=50") == [
        "model.patch_size 'none': input should be a valid integer, unable to parse string as an "
        "integer"
    ]
    assert len(faults("schedule.warmup=-5")) == 1


def test_a_size_below_the_patch_size_has_a_right_one_near() -> None:
    assert faults("crops.local_size=8")[0].endswith("no multiple of model.patch_size; say 16")


@pytest.mark.parametrize("name", [name for name in shipped() if name.startswith("distill_")])
def test_a_student_needs_a_teacher_and_drops_no_path(name: str) -> None:
    with pytest.raises(UserError, match=r"distill.teacher: is missing"):
        load(name)
    with pytest.raises(UserError, match=r"model.drop_path 0.1: a distilled student drops none"):
        load(name, ["distill.teacher=runs/g", "model.drop_path=0.1"])
    config = load(name, ["distill.teacher=runs/g"])
    for ranks in (1, 8, 32):
        assert images_per_batch(config, ranks) * ranks <= max(128, config.schedule.batch / 16)


@pytest.mark.parametrize("name", shipped())
def test_shipped_configs_make_a_model(name: str) -> None:
    """All widths fit together, up to the 1.1 B of ViT-g."""
    given = ["distill.teacher=runs/g"] if name.startswith("distill_") else []
    config = load(name, given)
    with torch.device("meta"):
        model = StudentTeacher(config.model, config.objective)
    backbone = model.teacher["backbone"]
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    assert (parameters > 1.1e9) == (name == "vitg14")
    grid = config.model.image_size // config.model.patch_size
    assert backbone.pos_embed.shape == (1, 1 + grid**2, config.model.width)
    assert model.teacher.keys() == (
        {"backbone", "dino_head"} | (set() if config.objective.ibot_head is None else {"ibot_head"})
    )


def test_a_config_is_what_it_was_written_as() -> None:
    config = load("vitg14")
    assert with_settings(config.model_dump(mode="json"), [], "again") == config
    assert Config() == load("vits14", ["model.drop_path=0.3"])


def test_too_few_images_at_a_time_are_warned_of() -> None:
    config = load("vits14", ["schedule.batch=256"])
    assert config.warnings(16) == []
    (koleo,) = config.warnings(32)
    assert "KoLeo spreads the 8 images that a rank has" in koleo
    assert load("vits14", ["schedule.batch=256", "objective.koleo_weight=0"]).warnings(32) == []
    sinkhorn, _ = load("vits14", ["schedule.batch=256", "parallel.accumulate=32"]).warnings()
    assert "of 8 at a time (batch / parallel.accumulate) Sinkhorn has too few" in sinkhorn


def test_one_setting_of_the_objective_leaves_the_heads() -> None:
    whole = load("vits14").objective
    assert whole.ibot_head is not None
    assert load("vits14", ["objective.koleo_weight=0"]).objective == replace(whole, koleo_weight=0)
    fewer = load("vits14", ["objective.dino_head.prototypes=64"]).objective
    assert fewer == replace(whole, dino_head=replace(whole.dino_head, prototypes=64))
    assert load("vits14", ["objective.ibot_head=null"]).objective.ibot_head is None
