"""The edits that make copies for benchmarks/copies.py: PIL only, seeded, one name each."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

Rng = np.random.Generator
Transform = Callable[[Image.Image, Rng], Image.Image]


def crop(image: Image.Image, rng: Rng, low: float, high: float) -> Image.Image:
    """A window of `low` to `high` of the area, at the image's own aspect."""
    scale = np.sqrt(rng.uniform(low, high))
    width, height = round(image.width * scale), round(image.height * scale)
    left = int(rng.integers(0, image.width - width + 1))
    top = int(rng.integers(0, image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def resize(image: Image.Image, rng: Rng) -> Image.Image:
    """30 to 80 % of each side, aspect changed by up to 10 %."""
    scale = rng.uniform(0.3, 0.8)
    size = [max(16, round(side * scale * rng.uniform(0.95, 1.05))) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, rng: Rng) -> Image.Image:
    """Quality 30 to 90."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(30, 91)))
    return Image.open(buffer).convert("RGB")


def colour(image: Image.Image, rng: Rng) -> Image.Image:
    """Brightness, contrast and saturation times 0.6 to 1.6 each."""
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(float(np.exp(rng.uniform(np.log(0.6), np.log(1.6)))))
    return image


def grayscale(image: Image.Image, _rng: Rng) -> Image.Image:
    return ImageOps.grayscale(image).convert("RGB")


def blur(image: Image.Image, rng: Rng) -> Image.Image:
    """Gaussian, radius 0.5 to 1.5 % of the longer side."""
    return image.filter(ImageFilter.GaussianBlur(max(image.size) * rng.uniform(0.005, 0.015)))


def flip(image: Image.Image, _rng: Rng) -> Image.Image:
    return ImageOps.mirror(image)


def rotate(image: Image.Image, rng: Rng) -> Image.Image:
    """Up to 10 degrees, the corners black."""
    return image.rotate(float(rng.uniform(-10, 10)), Image.Resampling.BICUBIC)


def text(image: Image.Image, rng: Rng) -> Image.Image:
    """A caption of 8 to 20 % of the height across the image, white on black edges."""
    image = image.copy()
    font = ImageFont.load_default(max(8.0, image.height * rng.uniform(0.08, 0.2)))
    words = " ".join(rng.permutation(["when", "you", "find", "a", "copy", "of", "this"])[:4])
    place = (image.width * rng.uniform(0, 0.3), image.height * rng.uniform(0, 0.8))
    ImageDraw.Draw(image).text(
        place, words, (255, 255, 255), font, stroke_width=2, stroke_fill=(0, 0, 0)
    )
    return image


def border(image: Image.Image, rng: Rng) -> Image.Image:
    """A frame of one colour, 5 to 15 % of each side."""
    red, green, blue = (int(level) for level in rng.choice([0, 128, 255], 3))
    frame = tuple(round(side * rng.uniform(0.05, 0.15)) for side in image.size)
    return ImageOps.expand(image, (frame[0], frame[1]), (red, green, blue))


def combined(image: Image.Image, rng: Rng) -> Image.Image:
    """Crop to 50-90 %, colour, resize, JPEG; half of the time mirrored, half with a caption."""
    image = resize(colour(crop(image, rng, 0.5, 0.9), rng), rng)
    if rng.random() < 0.5:
        image = flip(image, rng)
    if rng.random() < 0.5:
        image = text(image, rng)
    return jpeg(image, rng)


TRANSFORMS: dict[str, Transform] = {
    "crop 70-90 % of the area": lambda image, rng: crop(image, rng, 0.7, 0.9),
    "crop 50-70 % of the area": lambda image, rng: crop(image, rng, 0.5, 0.7),
    "crop 25-50 % of the area": lambda image, rng: crop(image, rng, 0.25, 0.5),
    "resize": resize,
    "JPEG 30-90": jpeg,
    "colour jitter": colour,
    "greyscale": grayscale,
    "blur": blur,
    "mirror": flip,
    "rotate up to 10 degrees": rotate,
    "caption": text,
    "border": border,
    "combined": combined,
}
