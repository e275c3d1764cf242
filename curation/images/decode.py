"""Bytes to pixels, checked and bounded: faults are named before anything large is allocated."""

import io
import math
import re
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from curation.images.structure import excess

# The sizes are checked here, before decoding; Pillow's own limit would only add a second message.
Image.MAX_IMAGE_PIXELS = None
ImageFile.LOAD_TRUNCATED_IMAGES = False
# Unpacked PNG text and colour profiles: editors write some MB of them, a bomb writes any amount.
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20

EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
}


# MPO files open as JPEG; Pillow raises on any format it cannot open by that name.
FORMATS = tuple(name for name in EXTENSIONS if name != "MPO")

# How a file of a known format begins: what can't be opened all the same is damaged.
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*")
SIGNATURES = (
    ("jpg", b"\xff\xd8\xff"),
    ("png", b"\x89PNG\r\n\x1a\n"),
    ("gif", b"GIF8"),
    ("webp", b"RIFF....WEBP"),
    ("tif", b"II\\*\0|MM\0\\*"),
    ("bmp", b"BM....\0\0\0\0"),
)
TIFF_TILE_SIDES = (322, 323)
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """An image that can't be used; the first word of the message is a stable reason."""


@dataclass(frozen=True)
class Limits:
    """What is accepted: shorter side and area in pixels, file size in bytes, long : short side."""

    min_side: int
    max_pixels: int
    max_bytes: int
    max_aspect: float


@dataclass(frozen=True)
class Decoded:
    """An RGB image, upright, with the extension of its real format and its upright size."""

    pixels: Image.Image
    ext: str
    width: int
    height: int


def decode(data: bytes, limits: Limits) -> Decoded:
    """Decodes the first frame to upright 8-bit RGB. Raises BadImage with a reason."""
    image = examine(data, limits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image.load()
            rgb = _to_rgb(_upright(image))
        except MemoryError:
            raise BadImage("too_large not enough memory to decode it") from None
        except Exception as error:  # Pillow's decoders raise many types on hostile bytes
            raise _bad(error, data) from None
    return Decoded(rgb, extension(image), rgb.width, rgb.height)


def examine(data: bytes, limits: Limits) -> Image.Image:
    """A file that keeps the limits, opened but not decoded. Raises BadImage with a reason."""
    if not data:
        raise BadImage("empty_file")
    if len(data) > limits.max_bytes:
        raise BadImage(f"too_large {len(data)} bytes, at most {limits.max_bytes}")
    if many := excess(data):
        raise BadImage(f"too_many_pieces more {many} than an image needs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata that doesn't matter here
        image = _open(data)
        _check_size(image.size, limits)
        _check_tiles(image, limits)
    return image


def extension(image: Image.Image) -> str:
    """Of an opened image's real format."""
    return EXTENSIONS[image.format or "JPEG"]


def extension_of(head: bytes) -> str | None:
    """The extension of a known format by a file's first 16 bytes."""
    return next((ext for ext, start in SIGNATURES if re.match(start, head, re.DOTALL)), None)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        if data.startswith(MAGIC) or data[8:12] == b"WEBP":
            raise _bad(ValueError("its header can't be read"), data) from None
        raise BadImage("not_an_image its content is none of the known formats") from None
    except Exception as error:
        raise _bad(error, data) from None


def _bad(error: Exception, data: bytes) -> BadImage:
    """Pillow's error as a reason."""
    text = " ".join(str(error).split())[:120]
    if "MAX_TEXT" in text:
        return BadImage("too_large its metadata unpacks to too much")
    # A RIFF file (WebP) says its own length.
    short = data[:4] == b"RIFF" and len(data) < int.from_bytes(data[4:8], "little") + 8
    return BadImage(f"{'truncated' if short or 'truncated' in text.lower() else 'corrupt'} {text}")


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise BadImage(f"too_many_pixels {width}x{height}, at most {limits.max_pixels}")
    if min(width, height) < limits.min_side:
        raise BadImage(f"too_small {width}x{height}, the shorter side must be {limits.min_side}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise BadImage(f"extreme_aspect {width}x{height}, at most {limits.max_aspect:g} : 1")


def _check_tiles(image: Image.Image, limits: Limits) -> None:
    """A small TIFF may declare huge tiles, which are unpacked whole."""
    if image.format == "TIFF":
        sides = [image.tag_v2.get(tag, 1) for tag in TIFF_TILE_SIDES]  # type: ignore[attr-defined]
        if all(isinstance(side, int) for side in sides) and math.prod(sides) > limits.max_pixels:
            raise BadImage(f"too_many_pixels tiles of {sides[0]}x{sides[1]}")


def turn(image: Image.Image) -> Image.Transpose | None:
    """What its EXIF asks for; EXIF that can't be read is no reason to lose the image."""
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow's EXIF parser raises many types on damaged bytes
        return None


def _upright(image: Image.Image) -> Image.Image:
    needed = turn(image)
    return image if needed is None else image.transpose(needed)


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: deeper samples are scaled rather than clipped, transparency is laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0, neginf=0)
        white = _white(image.mode, float(values.max(initial=0)))
        image = Image.fromarray(np.clip(values * (255 / white), 0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(ground, layer)
    return image.convert("RGB")


def _white(mode: str, brightest: float) -> float:
    """The value that is white: 16-bit samples have their own, 32-bit ones don't say."""
    if mode.startswith("I;16"):
        return 65535.0
    if mode == "F" and brightest <= 1:
        return 1.0
    return next((white for white in (255.0, 65535.0) if brightest <= white), brightest)
