"""Thumbnails: of images in shards, and of the others, read where they came from."""

import io
import threading
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image

from curation.runtime.store import Store, StoreError, open_store, read_table
from curation.schema import PARTS_TABLE
from curation.service import models
from curation.service.cache import Cache
from curation.service.runs import NotThere, Run
from curation.service.shards import ShardReader

SIDES = (176, 512)  # of the longer side; others are rounded up
MAX_PIXELS = 64_000_000
MAX_BYTES = 64 << 20
CACHE_BYTES = 128 << 20
DECODERS = 2
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# (the run's recipe as YAML, an input image's bytes) -> how it may be shown. Raises NotThere.
Show = Callable[[str, bytes], Image.Image]


class Pictures:
    """Makes thumbnails, a few at a time, and keeps the latest."""

    def __init__(self, shards: ShardReader, show: Show) -> None:
        self._shards, self._show = shards, show
        self._made: Cache[bytes] = Cache(CACHE_BYTES, len)
        self._decoders = threading.BoundedSemaphore(DECODERS)

    def of_sample(self, run: Run, shard: str, key: str, side: int) -> bytes:
        """WebP of an image in a shard. Raises NotThere."""
        side = next((one for one in SIDES if one >= side), SIDES[-1])

        def make() -> bytes:
            data = self._shards.image(run, shard, key)[0]
            return self._thumbnail(lambda: _opened(data, side), side)

        return self._made.get((run.path, shard, key, side), make)

    def of_image(self, run: Run, image: models.Image, side: int) -> bytes:
        """WebP of any input image, from its shard or else from its source. Raises NotThere."""
        if image.shard and image.id:
            return self.of_sample(run, image.shard, image.id, side)
        side = next((one for one in SIDES if one >= side), SIDES[-1])

        def make() -> bytes:
            data = _from_source(run.store, image.image)
            return self._thumbnail(lambda: self._show(run.recipe(), data), side)

        return self._made.get((run.path, image.image, image.id, side), make)

    def _thumbnail(self, open_: Callable[[], Image.Image], side: int) -> bytes:
        """Never the bytes themselves: what comes from a source is shown as pixels or not at all."""
        with self._decoders, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image, buffer = open_(), io.BytesIO()
                image.thumbnail((side, side))
                image.save(buffer, "WEBP", quality=80, method=2)
                return buffer.getvalue()
            except NotThere:
                raise
            except Exception as error:  # Pillow's decoders raise many types on hostile bytes
                raise NotThere(f"no picture can be made of it: {type(error).__name__}") from None


def _opened(data: bytes, side: int) -> Image.Image:
    """An image of a shard: that it can be decoded within bounds was seen when it was embedded."""
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError("too many pixels")
    image.draft("RGB", (2 * side, 2 * side))  # a JPEG is decoded small
    turn = image.getexif().get(0x0112, 1)
    image.thumbnail((side, side))
    image = image.convert("RGBA" if "A" in image.mode or "transparency" in image.info else "RGB")
    return image.rotate({3: 180, 6: 270, 8: 90}[turn], expand=True) if turn in (3, 6, 8) else image


def _from_source(run: Store, number: int) -> bytes:
    """Where `ingest` found the image: a file, or a place in an archive."""
    parts = read_table(run, PARTS_TABLE)
    at = int(np.searchsorted(parts["base"].to_numpy(), number, "right")) - 1
    part = parts.slice(at, 1).to_pylist()[0]
    if part["kind"] == "parquet":
        raise NotThere("images of Parquet sources are shown once they are in a shard")
    member = read_table(run, part["table"], row_group=part["row_group"]).slice(
        number - part["base"], 1
    )
    row = member.to_pylist()[0]
    if row["fault"] or not 0 < row["size"] <= MAX_BYTES:
        raise NotThere("this image has no picture")
    path = row["locator"].decode("utf-8", "surrogateescape")
    try:
        source = open_store(part["source"])
        if row["offset"] < 0:
            return source.read(path, 0, row["size"])
        return source.read(path, row["offset"], row["size"])
    except StoreError:
        raise NotThere("its source can't be read from here") from None
