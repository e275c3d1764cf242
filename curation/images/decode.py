"""Bytes to pixels, checked and bounded: what is wrong is named before anything large is allocated."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, ImageOps

# The sizes are checked here, before decoding; Pillow's own limit would only add a second message.
Image.MAX_IMAGE_PIXELS = None
ImageFile.LOAD_TRUNCATED_IMAGES = False

EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
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
    if not data:
        raise BadImage("empty_file")
    if len(data) > limits.max_bytes:
        raise BadImage(f"too_large {len(data)} bytes, at most {limits.max_bytes}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata that doesn't matter here
        image = _open(data)
        _check_size(image.size, limits)
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
            rgb = _to_rgb(upright)
        except MemoryError:
            raise BadImage("too_large not enough memory to decode it") from None
        except Exception as error:  # Pillow's decoders raise many types on hostile bytes
            text = " ".join(str(error).split())[:120]
            reason = "truncated" if "truncated" in text.lower() else "corrupt"
            raise BadImage(f"{reason} {text}") from None
    return Decoded(rgb, EXTENSIONS[image.format or "JPEG"], rgb.width, rgb.height)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=tuple(EXTENSIONS))
    except Image.UnidentifiedImageError:
        raise BadImage("not_an_image its content is none of the known formats") from None
    except Exception as error:
        raise BadImage(f"corrupt {' '.join(str(error).split())[:120]}") from None


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise BadImage(f"too_many_pixels {width}x{height}, at most {limits.max_pixels}")
    if min(width, height) < limits.min_side:
        raise BadImage(f"too_small {width}x{height}, the shorter side must be {limits.min_side}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise BadImage(f"extreme_aspect {width}x{height}, at most {limits.max_aspect:g} : 1")


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: 16-bit is scaled rather than clipped, transparency is laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float32)
        scale = 257.0 if values.max(initial=0) > 255 else 1.0
        image = Image.fromarray(np.clip(values / scale, 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(ground, layer)
    return image.convert("RGB")
