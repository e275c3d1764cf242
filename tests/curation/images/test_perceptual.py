"""The perceptual hash against scipy's DCT, on copies, and on images without any structure."""

import io

import numpy as np
import pytest
import scipy.fftpack
from PIL import Image, ImageDraw, ImageOps
from workbench import picture

from curation.images.perceptual import phash

skimage = pytest.importorskip("skimage")
PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "rocket", "clock", "brick", "moon")


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def by_scipy(image: Image.Image) -> int:
    """The hash as `imagehash.phash` defines it."""
    grey = image.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    dct = scipy.fftpack.dct(scipy.fftpack.dct(np.asarray(grey), axis=0), axis=1)[:8, :8]
    bits = (dct > np.median(dct)).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def apart(a: Image.Image, b: Image.Image) -> int:
    first, second = phash(a), phash(b)
    assert first is not None
    assert second is not None
    return (first ^ second).bit_count()


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_have_the_hash_that_scipy_gives(name: str) -> None:
    assert phash(photograph(name)) == by_scipy(photograph(name))


@pytest.mark.parametrize("seed", range(20))
def test_drawn_pictures_have_the_hash_that_scipy_gives(seed: int) -> None:
    image = picture(seed, 90 + seed, 140)
    assert phash(image) == by_scipy(image)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_copies_are_near_and_other_photographs_are_not(name: str) -> None:
    image, out = photograph(name), io.BytesIO()
    image.save(out, "JPEG", quality=40)
    copies = [
        Image.open(out).convert("RGB"),
        ImageOps.grayscale(image).convert("RGB"),
        image.resize((image.width // 3, image.height // 3), Image.Resampling.BICUBIC),
    ]
    assert all(apart(image, copy) <= 4 for copy in copies)
    assert all(apart(image, photograph(other)) > 10 for other in PHOTOGRAPHS if other != name)


def stripes(levels: list[int], turned: bool) -> Image.Image:
    plane = np.repeat(np.array(levels, np.uint8), 8)[None, :].repeat(96, axis=0)
    return Image.fromarray(plane.T if turned else plane).convert("RGB")


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGB", (100, 80), "black"),
        Image.new("RGB", (100, 80), (200, 30, 90)),
        stripes(list(range(0, 240, 20)), turned=False),
        stripes([0, 255] * 6, turned=True),
        Image.fromarray(np.random.default_rng(0).integers(99, 102, (300, 300, 3), np.uint8)),
    ],
    ids=["black", "coloured", "gradient", "stripes", "faint noise"],
)
def test_images_without_structure_have_no_hash(image: Image.Image) -> None:
    assert phash(image) is None


def test_little_drawings_have_one() -> None:
    page = Image.new("RGB", (300, 400), "white")
    ImageDraw.Draw(page).text((60, 80), "one line", fill="black")
    assert phash(page) is not None
