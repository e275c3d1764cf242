"""Every kind of image file to upright RGB, as Pillow shows it; everything else gets a reason."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from workbench import picture

import pretrain.decode
from pretrain.decode import BadImage, decode


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


PHOTO = picture(1, 50, 40)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1"])
def test_pixels_are_pillows(kind: str, mode: str) -> None:
    image = PHOTO.convert(mode)
    try:
        data = encoded(image, kind)
    except (OSError, ValueError):
        pytest.skip(f"{kind} has no {mode}")
    found = decode(data)
    assert found.dtype == np.uint8
    assert found.flags.writeable
    assert np.array_equal(found, np.array(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("options", [{"quality": 40}, {"progressive": True}, {"subsampling": 0}])
def test_jpegs_are_pillows_to_the_bit(options: dict[str, Any]) -> None:
    for seed, size in enumerate([(64, 48), (33, 17), (1, 1), (200, 3)]):
        data = encoded(picture(seed, *size), "JPEG", **options)
        assert np.array_equal(decode(data), np.array(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_images_are_turned_as_their_exif_says(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PHOTO, kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode(data), np.array(expected))


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert (decode(encoded(image, "PNG")) == 255).all()
    palette = Image.new("P", (4, 4))
    assert (decode(encoded(palette, "PNG", transparency=0)) == 255).all()


def test_deep_images_are_scaled() -> None:
    levels = np.array([[0, 257, 65535]], np.uint16)
    assert decode(encoded(Image.fromarray(levels), "PNG"))[0, :, 0].tolist() == [0, 1, 255]
    floats = Image.fromarray(np.array([[0.0, 0.5, np.nan, 1.0]], np.float32))
    assert decode(encoded(floats, "TIFF"))[0, :, 1].tolist() == [0, 128, 0, 255]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_file"),
        (b"<html>", "not_an_image"),
        (encoded(PHOTO, "JPEG")[:-200], "truncated"),
        (encoded(PHOTO, "PNG")[:-200], "truncated"),
        (encoded(PHOTO, "WEBP")[:-200], "corrupt"),
        (b"\xff\xd8\xff" + b"\0" * 100, "not_an_image"),
    ],
)
def test_what_can_not_be_decoded_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage) as raised:
        decode(data)
    assert str(raised.value).split()[0] == reason
    assert "\n" not in str(raised.value)


def test_bombs_are_refused_before_they_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadImage, match=r"^too_many_pixels 20000x20000, at most 100000000"):
        decode(encoded(Image.new("1", (20000, 20000)), "PNG"))
    monkeypatch.setattr(pretrain.decode, "MAX_PIXELS", 1999)
    with pytest.raises(BadImage, match=r"^too_many_pixels 50x40"):
        decode(encoded(PHOTO, "JPEG"))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF"]), st.data())
def test_damaged_bytes_never_raise_anything_else(kind: str, data: st.DataObject) -> None:
    whole = bytearray(encoded(PHOTO, kind))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(whole)))
    with contextlib.suppress(BadImage):
        assert decode(bytes(whole[:cut])).shape[2] == 3
