"""What `pretrain export` writes, loaded by timm and transformers: the same features."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer

from pretrain import checkpoint
from pretrain.cli import main
from pretrain.config import Config, parse, to_yaml
from pretrain.param_groups import adamw, param_groups
from pretrain.student_teacher import StudentTeacher
from pretrain.vit import ViT

HEAD = {"prototypes": 16, "hidden": 16, "bottleneck": 8}
MODELS = {
    "mlp": {"width": 48, "depth": 2, "heads": 3, "image_size": 56},
    "registers": {"width": 48, "depth": 2, "heads": 3, "image_size": 56, "registers": 4},
    "swiglu": {"width": 48, "depth": 2, "heads": 3, "image_size": 56, "ffn": "swiglu"},
}


@pytest.fixture(params=MODELS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, ViT, Config]:
    """A run with one checkpoint of random weights."""
    given = {"model": MODELS[request.param], "objective": {"dino_head": HEAD, "ibot_head": None}}
    config = parse(given, "test")
    model = StudentTeacher(config.model, config.objective)
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    optimizer = adamw(param_groups(model.student, 1.0, 0.2), (0.9, 0.999))
    writer = checkpoint.Writer(tmp_path, 1)
    writer.save(model, optimizer, checkpoint.Progress(7, {}, {}))
    writer.finish()
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    backbone = model.teacher["backbone"].eval()
    assert isinstance(backbone, ViT)
    return tmp_path, backbone, config


def exported(run: Path, kind: str) -> Path:
    out = run / kind
    assert main(["export", str(run), "--format", kind, "--out", str(out)]) == 0
    return out


@torch.inference_mode()
def test_timm_gives_the_same_features(run: tuple[Path, ViT, Config]) -> None:
    folder, ours, _ = run
    out = exported(folder, "timm")
    arguments = json.loads((out / "config.json").read_text())["model_args"]
    if arguments.get("mlp_layer") == "SwiGLUPacked":
        arguments |= {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}
    theirs = VisionTransformer(**arguments, num_classes=0).eval()
    theirs.load_state_dict(load_file(out / "model.safetensors"))
    images = torch.randn(2, 3, 56, 56)
    (tokens,) = ours([images])
    torch.testing.assert_close(theirs.forward_features(images)[:, 0], tokens.cls, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_transformers_gives_the_same_features(run: tuple[Path, ViT, Config]) -> None:
    transformers = pytest.importorskip("transformers")
    folder, ours, config = run
    out = exported(folder, "transformers")
    theirs = transformers.AutoModel.from_pretrained(out).eval()
    images = torch.randn(2, 3, 56, 56)
    (tokens,) = ours([images])
    found = theirs(images).last_hidden_state
    torch.testing.assert_close(found[:, 0], tokens.cls, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        found[:, 1 + config.model.registers :], tokens.patches, atol=1e-4, rtol=0
    )


def test_the_official_layout_has_our_names(run: tuple[Path, ViT, Config]) -> None:
    folder, ours, _ = run
    state = load_file(exported(folder, "dinov2") / "model.safetensors")
    assert state.keys() == ours.state_dict().keys()
    assert "blocks.0.ls1.gamma" in state
