"""What `pretrain export` writes, loaded by timm and transformers: the same features."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from pretrain import checkpoint
from pretrain.cli import main
from pretrain.config import Config, parse, to_yaml
from pretrain.export import _timm
from pretrain.param_groups import adamw, param_groups
from pretrain.student_teacher import StudentTeacher
from pretrain.vit import VIT_SIZES, ViT, ViTConfig

HEAD = {"prototypes": 16, "hidden": 16, "bottleneck": 8}
SHAPE = {"width": 48, "depth": 2, "heads": 3, "layerscale": 1.0}
MODELS = {  # (model, global crops, timm's architecture)
    "mlp": ({**SHAPE, "image_size": 56}, 56, "vit_small_patch14_dinov2"),
    "registers": ({**SHAPE, "registers": 4}, 224, "vit_small_patch14_reg4_dinov2"),
    "two registers": ({**SHAPE, "registers": 2}, 56, "vit_small_patch14_reg4_dinov2"),
    "swiglu": ({**SHAPE, "ffn": "swiglu"}, 224, "vit_giant_patch14_dinov2"),
    "trained at 224": (SHAPE, 224, "vit_small_patch14_dinov2"),
    "trained at 98": ({**SHAPE, "ffn_ratio": 2.0}, 98, "vit_small_patch14_dinov2"),
    "patch 16": ({**SHAPE, "patch_size": 16, "image_size": 64}, 96, "vit_small_patch14_dinov2"),
}
Run = tuple[Path, ViT, Config]


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with one checkpoint of random weights, its teacher and config."""
    model, size, _ = MODELS[request.param]
    crops = {"global_size": size, "local_size": model.get("patch_size", 14)}
    objective = {"dino_head": HEAD, "ibot_head": None}
    return made(
        tmp_path_factory.mktemp("run"), {"model": model, "crops": crops, "objective": objective}
    )


def made(folder: Path, given: dict[str, object]) -> Run:
    config = parse(given, "test")
    torch.manual_seed(0)
    model = StudentTeacher(config.model, config.objective)
    with torch.no_grad():
        for name, parameter in model.teacher["backbone"].named_parameters():
            least = 0.3 if "pos_embed" in name else 0.05
            parameter.add_(least * torch.randn_like(parameter))
    optimizer = adamw(param_groups(model.student, 1.0, 0.2), (0.9, 0.999))
    writer = checkpoint.Writer(folder, 1)
    writer.save(model, optimizer, checkpoint.Progress(7, {}, {}))
    writer.finish()
    (folder / "config.yaml").write_text(to_yaml(config))
    backbone = model.teacher["backbone"].eval()
    assert isinstance(backbone, ViT)
    return folder, backbone, config


def exported(run: Path, kind: str) -> Path:
    out = run / kind
    assert main(["export", str(run), "--format", kind, "--out", str(out)]) == 0
    return out


def crops(config: Config) -> torch.Tensor:
    size = config.crops.global_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@torch.inference_mode()
def test_timm_gives_the_same_features(run: Run, request: pytest.FixtureRequest) -> None:
    """At the size that the run was trained with, by the model's folder alone."""
    folder, ours, config = run
    out = exported(folder, "timm")
    architecture = json.loads((out / "config.json").read_text())["architecture"]
    assert architecture in {name for _, _, name in MODELS.values()}
    assert architecture == MODELS[request.node.callspec.params["run"]][2]
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    (tokens,) = ours([crops(config)])
    found = theirs.forward_features(crops(config))
    same(found[:, 0], tokens.cls)
    same(found[:, 1 + config.model.registers :], tokens.patches)
    same(theirs(crops(config)), tokens.cls)
    assert theirs.pretrained_cfg["input_size"][1] == config.crops.global_size
    assert theirs(torch.randn(1, 3, 112, 112)).shape == (1, config.model.width)


@torch.inference_mode()
def test_transformers_gives_the_same_features(run: Run) -> None:
    transformers = pytest.importorskip("transformers")
    folder, ours, config = run
    out = exported(folder, "transformers")
    theirs = transformers.AutoModel.from_pretrained(out).eval()
    (tokens,) = ours([crops(config)])
    found = theirs(crops(config)).last_hidden_state
    same(found[:, 0], tokens.cls)
    same(found[:, 1 + config.model.registers :], tokens.patches)


@torch.inference_mode()
def test_timm_reads_the_official_layout(run: Run, tmp_path: Path) -> None:
    """As it reads the official weights, by their names; at the grid that they have."""
    folder, ours, config = run
    state = load_file(exported(folder, "dinov2") / "model.safetensors")
    arguments = json.loads((exported(folder, "timm") / "config.json").read_text())
    name, given = arguments["architecture"], arguments["model_args"]
    given["img_size"] = config.model.image_size
    save_file(state, tmp_path / "official.safetensors")
    theirs = timm.create_model(
        name,
        pretrained=True,
        num_classes=0,
        pretrained_cfg_overlay={"file": str(tmp_path / "official.safetensors")},
        **given,
    ).eval()
    size = config.model.image_size - config.model.image_size % config.model.patch_size
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    same(theirs(images), ours([images])[0].cls)


BLOCK = """
    norm1.weight norm1.bias attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias ls1.gamma
    norm2.weight norm2.bias ls2.gamma
"""
FFN = {
    "mlp": "mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias",
    "swiglu": "mlp.w12.weight mlp.w12.bias mlp.w3.weight mlp.w3.bias",
}
OUTER = "cls_token pos_embed mask_token patch_embed.proj.weight patch_embed.proj.bias"


def test_the_official_layout_has_the_names_of_the_released_files(run: Run) -> None:
    """dinov2_vits14_pretrain.pth, dinov2_vitg14_pretrain.pth and those with registers."""
    folder, _, config = run
    state = load_file(exported(folder, "dinov2") / "model.safetensors")
    names = {*OUTER.split(), "norm.weight", "norm.bias"}
    names |= {"register_tokens"} if config.model.registers else set()
    for number in range(config.model.depth):
        block = f"{BLOCK} {FFN[config.model.ffn]}".split()
        names |= {f"blocks.{number}.{name}" for name in block}
    assert state.keys() == names
    assert state["pos_embed"].shape[1] == 1 + config.model.grid**2
    assert state["mask_token"].shape == (1, config.model.width)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", VIT_SIZES)
def test_known_sizes_have_timms_name(size: str, registers: int) -> None:
    name = _timm(ViTConfig(**VIT_SIZES[size], registers=registers))["architecture"]
    assert name == f"vit_{size}_patch14{'_reg4' if registers else ''}_dinov2"
    assert timm.is_model(name)


def test_what_transformers_can_not_say_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = {"dino_head": HEAD, "ibot_head": None}
    folder, _, _ = made(tmp_path, {"model": {**SHAPE, "ffn_ratio": 2.5}, "objective": objective})
    given = ["export", str(folder), "--format", "transformers", "--out", str(tmp_path / "out")]
    assert main(given) == 2
    assert "model.ffn_ratio 2.5: it knows whole numbers only" in capsys.readouterr().err


@pytest.mark.parametrize("below", ["", "folder"])
@pytest.mark.parametrize("kind", ["timm", "dinov2"])
def test_a_path_that_can_not_be_written_is_told(
    kind: str, below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = {"dino_head": HEAD, "ibot_head": None}
    folder, _, _ = made(tmp_path / "run", {"model": SHAPE, "objective": objective})
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / below
    assert main(["export", str(folder), "--format", kind, "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert f"--out {out}: can't be written: " in told
    assert "Traceback" not in told
    assert (tmp_path / "file").read_text() == ""
