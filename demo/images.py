"""The demo's images: cut from the photographs in scikit-image's wheel, with known copies.

Each photograph is cut into disjoint tiles. Some tiles of the subjects become the curated set, some
of another photograph the evaluation set, the rest the pool. Copies of pool and evaluation tiles and
a few broken files are added, and the file names tell what is what.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

SUBJECTS = ("chelsea", "coffee", "motorcycle_left")
EVALUATION = "astronaut"
OTHERS = (
    "brick",
    "camera",
    "coins",
    "hubble_deep_field",
    "ihc",
    "moon",
    "retina",
    "rocket",
)
TILE = 100  # pixels, about: the photographs are small
QUALITY = 92
COPY_EVERY = 3  # every third pool tile has a copy
SEED = 0


def make(folder: Path) -> None:
    """Writes `pool/`, `curated/` and `evaluation/` below `folder`; the same every time."""
    rng = np.random.default_rng(SEED)
    pool: list[tuple[str, Image.Image]] = []
    for name in SUBJECTS:
        for number, tile in enumerate(_tiles(name)):
            if number % 3 == 0:
                _save(folder / "curated" / f"{name}-{number:03d}.jpg", tile)
            else:
                pool.append((f"{name}-{number:03d}", tile))
    for number, tile in enumerate(_tiles(EVALUATION)):
        if number % 2 == 0:
            _save(folder / "evaluation" / f"{EVALUATION}-{number:03d}.jpg", tile)
            leak = _copy(tile, "recompressed", rng)
            _save(folder / "pool" / f"{EVALUATION}-{number:03d}.leak-recompressed.jpg", leak)
        else:
            pool.append((f"{EVALUATION}-{number:03d}", tile))
    for name in OTHERS:
        pool += [(f"{name}-{number:03d}", tile) for number, tile in enumerate(_tiles(name))]
    for number, (name, tile) in enumerate(pool):
        _save(folder / "pool" / f"{name}.jpg", tile)
        if number % COPY_EVERY == 0:
            kind = list(COPIES)[number // COPY_EVERY % len(COPIES)]
            _save(folder / "pool" / f"{name}.copy-{kind}.jpg", _copy(tile, kind, rng))
    _broken(folder / "pool", pool[0][1])


def _tiles(name: str) -> list[Image.Image]:
    """Disjoint tiles of one photograph, row by row."""
    path = next((Path(skimage.__file__).parent / "data").glob(f"{name}.*"))
    photograph = Image.open(path).convert("RGB")
    columns, rows = (max(1, round(side / TILE)) for side in photograph.size)
    columns, rows = min(columns, 8), min(rows, 5)
    width, height = photograph.width // columns, photograph.height // rows
    boxes = [
        (column * width, row * height, (column + 1) * width, (row + 1) * height)
        for row in range(rows)
        for column in range(columns)
    ]
    return [photograph.crop(box) for box in boxes]


def _recompressed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(35, 70)))
    return Image.open(buffer)


def _cropped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    width, height = image.size
    left, top = (int(rng.integers(0, side // 10 + 1)) for side in (width, height))
    return image.crop((left, top, left + width * 9 // 10, top + height * 9 // 10))


COPIES: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "recompressed": _recompressed,
    "smaller": lambda image, _: image.resize((image.width * 2 // 3, image.height * 2 // 3)),
    "cropped": _cropped,
    "brighter": lambda image, _: ImageEnhance.Brightness(image).enhance(1.25),
    "blurred": lambda image, _: image.filter(ImageFilter.GaussianBlur(1)),
    "bordered": lambda image, _: ImageOps.expand(image, 4, "white"),
}


def _copy(image: Image.Image, kind: str, rng: np.random.Generator) -> Image.Image:
    return COPIES[kind](image, rng)


def _save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=QUALITY)


def _broken(folder: Path, tile: Image.Image) -> None:
    """What every real pool has: damaged, empty, tiny and mislabelled files, and exact copies."""
    buffer = io.BytesIO()
    tile.save(buffer, "JPEG")
    (folder / "broken-truncated.jpg").write_bytes(buffer.getvalue()[:1500])
    (folder / "broken-empty.jpg").write_bytes(b"")
    (folder / "broken-page.jpg").write_text("<html>404 Not Found</html>")
    tile.resize((8, 8)).save(folder / "broken-tiny.png")
    whole = sorted(folder.glob("moon-*.jpg"))[:5]
    for path in whole:
        (folder / f"{path.stem}.copy-exact.jpg").write_bytes(path.read_bytes())
