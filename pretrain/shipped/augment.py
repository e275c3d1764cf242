"""Edited copies of an image for training the copy descriptor (SSCD's strong augmentations)."""

import io
import string

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

WORKING_SIDE = 256  # pixels of the longer side while editing: the descriptor sees fewer
_LETTERS = string.ascii_letters + string.digits + "    !?#@&"

Rng = np.random.Generator


def edited_copy(image: Image.Image, other: Image.Image, rng: Rng) -> Image.Image:
    """One heavily edited copy; `other` may serve as the picture that it is pasted onto."""
    copy = shrink(image)
    if rng.random() < 0.65:
        copy = _crop(copy, rng)
    if rng.random() < 0.4:
        copy = ImageOps.mirror(copy)
    if rng.random() < 0.12:
        copy = _rotate(copy, rng)
    if rng.random() < 0.55:
        copy = _jitter(copy, rng)
    if rng.random() < 0.1:
        copy = ImageOps.grayscale(copy).convert("RGB")
    if rng.random() < 0.25:
        copy = _coarsen(copy, rng)
    if rng.random() < 0.25:
        copy = copy.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3.5)))
    if rng.random() < 0.3:
        copy = _write_on(copy, rng)
    if rng.random() < 0.15:
        copy = _draw_shapes(copy, rng)
    if rng.random() < 0.2:
        copy = _border(copy, rng)
    elif rng.random() < 0.1:
        copy = _paste_onto(copy, other, rng)
    if rng.random() < 0.6:
        copy = _reencode(copy, rng)
    return copy


def light_copy(image: Image.Image, rng: Rng) -> Image.Image:
    """Close to the original, as it would lie in a pool: half of the time re-encoded."""
    copy = shrink(image)
    return _reencode(copy, rng) if rng.random() < 0.5 else copy


def shrink(image: Image.Image) -> Image.Image:
    """The image with its longer side at most WORKING_SIDE."""
    scale = WORKING_SIDE / max(image.size)
    if scale >= 1.0:
        return image
    size = tuple(max(8, round(side * scale)) for side in image.size)
    return image.resize((size[0], size[1]), Image.Resampling.BILINEAR)


def _crop(image: Image.Image, rng: Rng) -> Image.Image:
    """Area 0.2 to 1, aspect changed by up to 1.5."""
    area = np.exp(rng.uniform(np.log(0.2), 0.0))
    aspect = np.exp(rng.uniform(-np.log(1.5), np.log(1.5)))
    width = round(image.width * min(1.0, np.sqrt(area * aspect)))
    height = round(image.height * min(1.0, np.sqrt(area / aspect)))
    width, height = max(16, width), max(16, height)
    left = int(rng.integers(0, max(1, image.width - width + 1)))
    top = int(rng.integers(0, max(1, image.height - height + 1)))
    return image.crop((left, top, left + width, top + height))


def _rotate(image: Image.Image, rng: Rng) -> Image.Image:
    if rng.random() < 0.3:
        return image.rotate(90 * int(rng.integers(1, 4)), expand=True)
    return image.rotate(
        float(rng.uniform(-25, 25)),
        Image.Resampling.BILINEAR,
        expand=bool(rng.random() < 0.5),
        fillcolor=_colour(rng),
    )


def _jitter(image: Image.Image, rng: Rng) -> Image.Image:
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(float(np.exp(rng.uniform(-0.5, 0.5))))
    if rng.random() < 0.3:
        hue, saturation, value = image.convert("HSV").split()
        shift = int(rng.integers(-20, 21))  # of 256
        hue = hue.point([(level + shift) % 256 for level in range(256)])
        image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return image


def _coarsen(image: Image.Image, rng: Rng) -> Image.Image:
    scale = rng.uniform(0.2, 0.7)
    small = (max(16, round(image.width * scale)), max(16, round(image.height * scale)))
    return image.resize(small, Image.Resampling.BILINEAR)


def _write_on(image: Image.Image, rng: Rng) -> Image.Image:
    image = image.copy()
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 4))):
        letters = rng.integers(0, len(_LETTERS), int(rng.integers(3, 22)))
        text = "".join(_LETTERS[i] for i in letters)
        font = ImageFont.load_default(max(6.0, image.height * rng.uniform(0.06, 0.22)))
        place = (rng.uniform(-0.1, 0.7) * image.width, rng.uniform(0, 0.9) * image.height)
        outlined = int(rng.random() < 0.5)
        draw.text(place, text, _colour(rng), font, stroke_width=outlined, stroke_fill=_colour(rng))
    return image


def _draw_shapes(image: Image.Image, rng: Rng) -> Image.Image:
    """Discs and boxes, as stickers, emoji and logos cover a part of the image."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 4))):
        side = rng.uniform(0.1, 0.35) * min(image.size)
        left = rng.uniform(0, image.width - side)
        top = rng.uniform(0, image.height - side)
        box = (left, top, left + side, top + side * rng.uniform(0.6, 1.0))
        shape = draw.ellipse if rng.random() < 0.6 else draw.rectangle
        shape(box, _colour(rng), _colour(rng))
    return image


def _border(image: Image.Image, rng: Rng) -> Image.Image:
    """A frame or letter-box bars of up to 25 % of the side."""
    across, along = (
        round(side * rng.uniform(0.02, 0.25)) if rng.random() < 0.75 else 0 for side in image.size
    )
    return ImageOps.expand(image, (across, along), _colour(rng))


def _paste_onto(image: Image.Image, other: Image.Image, rng: Rng) -> Image.Image:
    """The image covers 40 to 80 % of another one, so that its own content still prevails."""
    canvas = shrink(other).resize(image.size, Image.Resampling.BILINEAR)
    scale = np.sqrt(rng.uniform(0.4, 0.8))
    size = (max(8, round(image.width * scale)), max(8, round(image.height * scale)))
    left = int(rng.integers(0, max(1, image.width - size[0] + 1)))
    top = int(rng.integers(0, max(1, image.height - size[1] + 1)))
    canvas.paste(image.resize(size, Image.Resampling.BILINEAR), (left, top))
    return canvas


def _reencode(image: Image.Image, rng: Rng) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(20, 95)))
    return Image.open(buffer).convert("RGB")


def _colour(rng: Rng) -> tuple[int, int, int]:
    """Black, white, or any."""
    kind = rng.random()
    if kind < 0.25:
        return (0, 0, 0)
    if kind < 0.5:
        return (255, 255, 255)
    red, green, blue = rng.integers(0, 256, 3)
    return (int(red), int(green), int(blue))
