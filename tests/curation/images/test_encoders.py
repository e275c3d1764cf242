"""Encoders against timm and torchvision, and the built-in models against their cards."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from workbench import Models, picture

from curation.images import encoders
from curation.images.effort import semantic_effort
from curation.images.encoders import (
    DEMO_MODEL,
    InputFormat,
    copy_thresholds,
    describe_builtin,
    load_copy_descriptor,
    load_semantic,
)


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (224, 299), (96, 97), (1000, 300)])
def test_preparing_an_image_is_torchvisions_resize_and_centre_crop(size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(values)
    bicubic = transforms.InterpolationMode.BICUBIC
    reference = transforms.Compose([transforms.Resize(256, bicubic), transforms.CenterCrop(224)])
    form = InputFormat(224, 256, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    wanted = np.asarray(reference(image)).transpose(2, 0, 1)
    np.testing.assert_array_equal(form.prepare(image), wanted)


@pytest.mark.parametrize(("precision", "off"), [("fp32", 1e-5), ("bf16", 0.02), ("fp16", 0.004)])
def test_a_timm_model_gives_timms_features(models: Models, precision: str, off: float) -> None:
    ours = load_semantic("test_vit", models.encoder.read_bytes(), precision)
    net = timm.create_model("test_vit", num_classes=0)
    from safetensors.torch import load_file

    net.load_state_dict(load_file(models.encoder))
    batch = np.stack([ours.prepare(picture(seed, 200, 170)) for seed in range(3)])
    config = net.default_cfg
    mean, std = (np.array(config[name], np.float32).reshape(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        wanted = net.eval()(torch.from_numpy((batch / np.float32(255) - mean) / std)).numpy()
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(ours(batch), wanted, atol=off)


@pytest.mark.slow  # compiles
def test_a_compiled_model_gives_the_same_and_is_compiled_for_one_size(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "COMPILED_ON", ("cuda", "cpu"))
    monkeypatch.setattr(encoders, "ONEDNN_LINEAR", None)
    torch.compiler.reset()
    content, rng = models.encoder.read_bytes(), np.random.default_rng(0)
    plain = load_semantic("test_vit", content, "fp32")
    compiled = load_semantic("test_vit", content, "fp32", full=4)
    batch = rng.integers(0, 256, (7, 3, plain.form.size, plain.form.size), np.uint8)
    found = [compiled(batch[:4])]
    with torch.compiler.set_stance("fail_on_recompile"):
        found += [compiled(batch[4:]), compiled(batch[:1])]
    np.testing.assert_allclose(np.concatenate(found), plain(batch[[*range(7), 0]]), atol=1e-5)


def test_batches_that_were_begun_are_waited_for_in_any_order(models: Models) -> None:
    model = load_semantic("test_vit", models.encoder.read_bytes(), "fp32")
    rng = np.random.default_rng(0)
    batches = rng.integers(0, 256, (3, 2, 3, model.form.size, model.form.size), np.uint8)
    waiting = [model.start(batch) for batch in batches]
    for number in (2, 0, 1):
        np.testing.assert_array_equal(waiting[number](), model(batches[number]))


def test_a_model_that_uses_weights_without_their_layer() -> None:
    torch.manual_seed(0)
    name = "eva02_tiny_patch14_224"
    plain = timm.create_model(name, num_classes=0).eval()
    model = load_semantic(name, save(plain.state_dict()), "fp32")
    pixels = model.prepare(picture(3, 300, 300))[None]
    mean, std = (
        torch.tensor(which).view(3, 1, 1) * 255 for which in (model.form.mean, model.form.std)
    )
    scaled = (torch.from_numpy(pixels) - mean) / std
    with torch.inference_mode():
        true = torch.nn.functional.normalize(plain(scaled), dim=1).numpy()
    np.testing.assert_allclose(model(pixels), true, atol=1e-5)


def test_the_flop_of_a_loaded_model_are_those_of_timms() -> None:
    loaded = load_semantic(DEMO_MODEL, None, "fp32")
    plain = timm.models.VisionTransformer(**describe_builtin("semantic")["arch"])
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        plain.to(loaded.device)(
            torch.zeros(1, 3, loaded.form.size, loaded.form.size, device=loaded.device)
        )
    assert semantic_effort(DEMO_MODEL).flop == counter.get_total_flops()


def test_the_built_in_models_are_what_their_cards_say() -> None:
    for model, kind in (
        (load_semantic(DEMO_MODEL, None, "fp32"), "semantic"),
        (load_copy_descriptor(None), "copy"),
    ):
        card = describe_builtin(kind)
        rows = model(np.stack([model.prepare(picture(seed)) for seed in range(2)]))
        assert rows.shape == (2, card["dim"])
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert copy_thresholds(builtin=True) == describe_builtin("copy")["thresholds"]
    assert copy_thresholds(builtin=False) == {"min_cosine": 0.6, "holdout_min_cosine": 0.45}
