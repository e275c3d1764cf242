"""Image bytes -> upright 8-bit RGB pixels, checked before anything large is allocated."""

import io
import warnings

import numpy as np
import torch
import torchvision.io
from numpy.typing import NDArray
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError

Pixels = NDArray[np.uint8]

# Sizes are checked here; Pillow's own limit would only warn.
Image.MAX_IMAGE_PIXELS = None
ImageFile.LOAD_TRUNCATED_IMAGES = False
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20  # unpacked text and colour profiles of a PNG

MAX_PIXELS = 100_000_000  # 300 MB decoded; what `curate` accepts as well
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ORIENTATION = 0x0112  # EXIF tag
TIFF_TILE_SIDES = (322, 323)  # tags
# What turns an image upright, by its orientation: whether to transpose, then which axes to flip.
UPRIGHT: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}


class BadImage(Exception):
    """An image that can't be used; the first word is a stable reason."""


def decode(data: bytes) -> Pixels:
    """(H, W, 3) RGB of the first frame, turned as its EXIF says. Errors: BadImage.

    Deeper samples are scaled to 8 bits, transparency is laid on white.
    """
    if not data:
        raise BadImage("empty_file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata, and that bytes can't be written
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(image)
            pixels = _jpeg(data) if _is_plain_jpeg(image) else np.array(_rgb(image))
        except BadImage:
            raise
        except UnidentifiedImageError:
            raise BadImage("not_an_image no known format, or its header is damaged") from None
        except MemoryError:
            raise BadImage("too_large not enough memory to decode it") from None
        except Exception as error:  # decoders raise many types on hostile bytes
            text = " ".join(str(error).split())[-120:]
            reason = "truncated" if "truncated" in text.lower() else "corrupt"
            raise BadImage(f"{reason} {text}") from None
        return _upright(pixels, image)


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"too_many_pixels {image.width}x{image.height}, at most {MAX_PIXELS}")
    if image.format == "TIFF":  # a small one may declare huge tiles, which are unpacked whole
        across, down = (image.tag_v2.get(tag, 1) for tag in TIFF_TILE_SIDES)  # type: ignore[attr-defined]
        if across * down > MAX_PIXELS:
            raise BadImage(f"too_many_pixels tiles of {across}x{down}")


def _is_plain_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")


def _jpeg(data: bytes) -> Pixels:
    """The same pixels as Pillow's, in two thirds of the time (benchmarks/crops.py)."""
    raw = torch.frombuffer(data, dtype=torch.uint8)
    rgb = torchvision.io.decode_jpeg(raw, mode=torchvision.io.ImageReadMode.RGB)
    pixels: Pixels = rgb.permute(1, 2, 0).numpy()  # its memory is (H, W, 3) already
    return pixels


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0, neginf=0)
        white = _white(image.mode, float(values.max(initial=0)))
        image = Image.fromarray(np.clip(values * (255 / white), 0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def _white(mode: str, brightest: float) -> float:
    """The value that is white: 16-bit samples have their own, 32-bit ones don't say."""
    if mode.startswith("I;16"):
        return 65535.0
    if mode == "F" and brightest <= 1:
        return 1.0
    return next((white for white in (255.0, 65535.0) if brightest <= white), brightest)


def _upright(pixels: Pixels, image: Image.Image) -> Pixels:
    """A view; EXIF that can't be read is no reason to lose the image."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow's EXIF parser raises many types on damaged bytes
        turn = None
    if turn is None:
        return pixels
    transposed, axes = turn
    return np.flip(pixels.transpose(1, 0, 2) if transposed else pixels, axes)
