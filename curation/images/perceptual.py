"""Perceptual hash (pHash): which of an image's lowest frequencies lie above their median."""

import numpy as np
from PIL import Image

SIDE, LOW = 32, 8
FLOOR = 16.0  # 3.5 standard deviations of what rounding 32 x 32 levels does to a coefficient
LEAST_BITS = 32  # whose coefficients must lie further than that from the median
_DCT = np.cos(np.pi / SIDE * np.arange(LOW)[:, None] * (np.arange(SIDE) + 0.5))  # (8, 32)


def phash(image: Image.Image) -> int | None:
    """64 bits of an RGB image, row by row, the lowest frequency first and most significant.

    The 8 x 8 lowest coefficients of a 32 x 32 grey image's DCT against their median, the constant
    among them: as `imagehash.phash` (Zauner 2010). None for images of one colour, plain gradients
    and stripes: so little of their hash is more than rounding that all would look alike.
    """
    grey = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    low = _DCT @ np.asarray(grey, np.float64) @ _DCT.T
    above = low - np.median(low)
    if (np.abs(above) > FLOOR).sum() < LEAST_BITS:
        return None
    return int.from_bytes(np.packbits(above > 0).tobytes(), "big")
