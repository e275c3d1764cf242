"""The weights in the repository, on photographs that no training saw (scikit-image's)."""

import io
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

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


def test_the_demo_encoder_puts_a_photo_near_its_crop(photos: list[Image.Image]) -> None:
    tensors, description = read_weights(WEIGHTS / "demo_encoder.safetensors")
    model = build_vit(description["arch"], seed=0).eval()
    model.load_state_dict(tensors)
    views = [evaluation_view(image) for image in photos + [central(photo) for photo in photos]]
    with torch.inference_mode():
        rows = torch.nn.functional.normalize(model(to_batch(views)))
    cosine = rows[len(photos) :] @ rows[: len(photos)].T
    assert cosine.argmax(dim=1).tolist() == list(range(len(photos)))
