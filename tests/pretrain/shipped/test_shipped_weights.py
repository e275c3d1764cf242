"""The weights in the repository, on photographs that no training saw (scikit-image's)."""

import io
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from curation.images.encoders import load_copy_descriptor
from pretrain.shipped.copy_descriptor import CopyDescriptor, squash
from pretrain.shipped.export import read_weights
from pretrain.shipped.images import load_rgb, to_batch
from pretrain.shipped.timm_models import build_vit
from pretrain.shipped.windows import evaluation_view

WEIGHTS = Path(__file__).parents[3] / "curation" / "images" / "weights"
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    pytest.importorskip("skimage")
    return [load_rgb(Path(str(files("skimage.data") / name))) for name in PHOTOS]


def reencode(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=30)
    return Image.open(buffer).convert("RGB")


def central(image: Image.Image) -> Image.Image:
    across, along = image.width // 10, image.height // 10
    return image.crop((across, along, image.width - across, image.height - along))


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "crop": central,
    "smaller": lambda image: image.resize((image.width // 3, image.height // 3)),
    "jpeg": reencode,
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "mirror": ImageOps.mirror,
    "grey": lambda image: ImageOps.grayscale(image).convert("RGB"),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.3),
    "border": lambda image: ImageOps.expand(image, 25, (255, 255, 255)),
}


@pytest.mark.parametrize("name", ["demo_encoder", "copy_descriptor"])
def test_a_file_is_small_half_precision_and_describes_itself(name: str) -> None:
    path = WEIGHTS / f"{name}.safetensors"
    assert path.stat().st_size <= 8_000_000
    tensors, description = read_weights(path)
    assert all(value.isfinite().all() for value in tensors.values())
    assert description["name"] == name
    assert description["card"]["licence"] == "Apache-2.0"


@pytest.fixture(scope="module")
def copy_descriptor() -> CopyDescriptor:
    tensors, description = read_weights(WEIGHTS / "copy_descriptor.safetensors")
    model = CopyDescriptor(build_vit(description["arch"], seed=0), len(tensors["head.weight"]))
    model.load_state_dict(tensors)
    return model.eval()


@pytest.mark.parametrize("edit", EDITS)
def test_a_copy_is_nearer_to_its_photo_than_any_other_photo(
    edit: str, photos: list[Image.Image], copy_descriptor: CopyDescriptor
) -> None:
    size = copy_descriptor.backbone.patch_embed.img_size[0]
    both = photos + [EDITS[edit](photo) for photo in photos]
    with torch.inference_mode():
        rows = copy_descriptor(to_batch([squash(image, size) for image in both]))
    cosine = rows[len(photos) :] @ rows[: len(photos)].T
    assert cosine.argmax(dim=1).tolist() == list(range(len(photos)))


@pytest.mark.parametrize("edit", ["grey", "blur", "smaller", "jpeg", "mirror"])
def test_what_leaves_the_brightness_is_above_the_threshold_and_other_photos_are_below_all(
    edit: str, photos: list[Image.Image], copy_descriptor: CopyDescriptor
) -> None:
    own = read_weights(WEIGHTS / "copy_descriptor.safetensors")[1]["thresholds"]
    size = copy_descriptor.backbone.patch_embed.img_size[0]
    both = photos + [EDITS[edit](photo) for photo in photos]
    with torch.inference_mode():
        rows = copy_descriptor(to_batch([squash(image, size) for image in both]))
    cosine = rows[len(photos) :] @ rows[: len(photos)].T
    assert cosine.diagonal().min() >= own["min_cosine"]
    others = cosine[~torch.eye(len(photos), dtype=torch.bool)]
    assert others.max() < own["holdout_min_cosine"]


def test_curation_reads_the_file_as_training_wrote_it(
    photos: list[Image.Image], copy_descriptor: CopyDescriptor
) -> None:
    """Photographs, and images of one colour, where the second part has nothing to go by."""
    images = photos + [Image.new("RGB", (50, 40), colour) for colour in ("black", "red", "grey")]
    with torch.inference_mode():
        ours = copy_descriptor(to_batch([squash(image, 160) for image in images])).numpy()
    model = load_copy_descriptor(None)
    theirs = model(np.stack([model.prepare(image) for image in images]))
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_the_demo_encoder_puts_a_photo_near_its_crop(photos: list[Image.Image]) -> None:
    tensors, description = read_weights(WEIGHTS / "demo_encoder.safetensors")
    model = build_vit(description["arch"], seed=0).eval()
    model.load_state_dict(tensors)
    views = [evaluation_view(image) for image in photos + [central(photo) for photo in photos]]
    with torch.inference_mode():
        rows = torch.nn.functional.normalize(model(to_batch(views)))
    cosine = rows[len(photos) :] @ rows[: len(photos)].T
    assert cosine.argmax(dim=1).tolist() == list(range(len(photos)))
