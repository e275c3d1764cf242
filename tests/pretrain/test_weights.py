"""Names of others: there and back without loss, and equal outputs where the library is there."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_vit import SMALL, giant, images, randomised

from pretrain.vit import ViT, ViTConfig
from pretrain.weights import (
    from_timm,
    from_transformers,
    to_official,
    to_timm,
    to_transformers,
)

KINDS = [{}, {"ffn": "swiglu"}, {"registers": 0}]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[n]) for n, v in one.items())


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_names_go_there_and_back(kind: dict[str, str]) -> None:
    state = randomised(ViT(replace(SMALL, **kind))).state_dict()
    theirs = to_transformers(state)
    assert same(from_transformers(theirs), state)
    assert same(to_official({f"dinov2.{n}": v for n, v in theirs.items()}), state)


@pytest.mark.parametrize("kind", KINDS)
def test_timm_names_go_there_and_back(kind: dict[str, str]) -> None:
    config = replace(SMALL, interpolate_offset=0.0, interpolate_antialias=True, **kind)
    model = randomised(ViT(config)).eval()
    with torch.no_grad():
        model.mask_token.zero_()
    back = to_official(to_timm(model.state_dict()))
    again = ViT(config).eval()
    again.load_state_dict(back)
    crop = images(2, 84)
    assert torch.allclose(again([crop])[0].cls, model([crop])[0].cls, atol=1e-6)


def test_timm_reads_what_is_written_for_it() -> None:
    state = randomised(giant()).state_dict()
    assert same(to_timm(from_timm(state)), state)


def test_names_of_training_checkpoints_are_understood() -> None:
    state = ViT(SMALL).state_dict()
    saved = {f"teacher.backbone.{n.replace('blocks.', 'blocks.0.')}": v for n, v in state.items()}
    saved["teacher.dino_head.mlp.0.weight"] = torch.zeros(1)
    assert same(to_official(saved), state)


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no cls_token"):
        to_official({"conv1.weight": torch.zeros(1)})


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_tokens_are_those_of_transformers(ffn: str, registers: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    given = {"num_register_tokens": registers} if registers else {}
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=84,
        use_swiglu_ffn=ffn == "swiglu", layerscale_value=1e-5, **given,
    )  # fmt: skip
    theirs = randomised(getattr(transformers, f"{kind}Model")(config)).eval()
    ours = ViT(ViTConfig(14, 32, 2, 2, ffn, image_size=84, registers=registers)).eval()
    theirs.save_pretrained(tmp_path)  # in the names of the hub; those in memory differ since 5.0
    saved = load_file(tmp_path / "model.safetensors")
    ours.load_state_dict(to_official(saved))
    with torch.inference_mode():
        (tokens,) = ours([images(2, 84)])
        expected = theirs(images(2, 84)).last_hidden_state
    found = torch.cat([tokens.cls[:, None], tokens.registers, tokens.patches], dim=1)
    assert (found - expected).abs().max() < 1e-4
    assert to_transformers(ours.state_dict()).keys() == saved.keys()
