"""Colour operations of the crops, compiled: one pass over planes that stay in the cache.

Each gives what torchvision's v2 function gives for a uint8 tensor, which cuts (not rounds) to
whole levels after every operation; here the levels are whole numbers in float32 planes (3, H, W).
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Planes = NDArray[np.float32]
F = TypeVar("F", bound=Callable[..., Any])

BLUR_TAPS = 9
REACH = BLUR_TAPS // 2
WHITE = np.float32(255)
# Rec. 601 weights, as torchvision and Pillow have them.
RED, GREEN, BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


# No fast maths: the bytes must not depend on what the compiler finds fast.
def _compiled(function: F) -> F:
    return cast(F, numba.njit(nogil=True, cache=True, error_model="numpy")(function))


@_compiled
def finish(
    resized: NDArray[np.uint8],
    flip: bool,
    operations: NDArray[np.int64],
    factors: NDArray[np.float64],
    grey: bool,
    sigma: float,
    threshold: int,
    out: NDArray[np.uint8],
) -> None:
    """(3, H, W) resized crop -> `out` (3, H, W): flip, colour jitter, grey, blur, solarize.

    `operations` are applied in their order (none: no jitter), each with `factors[operation]`.
    `sigma` 0 doesn't blur; `threshold` 256 doesn't solarize.
    """
    planes = np.empty(out.shape, np.float32)
    _unpack(resized, flip, planes)
    for operation in operations:
        if operation == BRIGHTNESS:
            brightness(planes, factors[BRIGHTNESS])
        elif operation == CONTRAST:
            contrast(planes, factors[CONTRAST])
        elif operation == SATURATION:
            saturation(planes, factors[SATURATION])
        else:
            hue(planes, factors[HUE])
    if grey:
        saturation(planes, 0.0)
    if sigma > 0:
        blur(planes, sigma)
    if threshold < 256:
        solarize(planes, threshold)
    source, target = planes.reshape(-1), out.reshape(-1)
    for i in range(source.size):
        target[i] = np.uint8(np.int32(source[i]))


@_compiled
def _unpack(levels: NDArray[np.uint8], flip: bool, planes: Planes) -> None:
    for channel in range(3):
        for y in range(levels.shape[1]):
            source, target = levels[channel, y], planes[channel, y]
            last = source.size - 1
            if flip:
                for x in range(source.size):
                    target[x] = source[last - x]
            else:
                for x in range(source.size):
                    target[x] = source[x]


@_compiled
def _level(value: np.float32) -> np.float32:
    return np.float32(np.int32(max(np.float32(0), min(WHITE, value))))


@_compiled
def _grey(red: np.float32, green: np.float32, blue: np.float32) -> np.int32:
    return np.int32(RED * red + GREEN * green + BLUE * blue)


@_compiled
def brightness(planes: Planes, factor: float) -> None:
    """Blends with black."""
    values, scale = planes.reshape(-1), np.float32(factor)
    for i in range(values.size):
        values[i] = _level(values[i] * scale)


@_compiled
def contrast(planes: Planes, factor: float) -> None:
    """Blends with the mean grey of the whole crop."""
    red, green, blue = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    total = np.int64(0)
    for i in range(red.size):
        total += _grey(red[i], green[i], blue[i])
    mean = np.float32(np.float32(total / red.size) * np.float32(1.0 - factor))
    values, scale = planes.reshape(-1), np.float32(factor)
    for i in range(values.size):
        values[i] = _level(values[i] * scale + mean)


@_compiled
def saturation(planes: Planes, factor: float) -> None:
    """Blends with each pixel's grey; 0 is a grey crop."""
    red, green, blue = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    scale, rest = np.float32(factor), np.float32(1.0 - factor)
    for i in range(red.size):
        grey = rest * np.float32(_grey(red[i], green[i], blue[i]))
        red[i] = _level(red[i] * scale + grey)
        green[i] = _level(green[i] * scale + grey)
        blue[i] = _level(blue[i] * scale + grey)


@_compiled
def _channel(value: np.float32, chroma: np.float32, sextant: np.float32) -> np.float32:
    """A channel of the HSV colour whose hue is `sextant` (0 to 6, cyclic) from the channel's."""
    six, one = np.float32(6), np.float32(1)
    sextant -= six * np.float32(np.int32(sextant / six))
    share = max(np.float32(0), min(min(sextant, np.float32(4) - sextant), one))
    return np.float32(np.int32((value - chroma * share) * np.float32(255.999)))


@_compiled
def hue(planes: Planes, shift: float) -> None:
    """Turns the hue by `shift` (-0.5 to 0.5 of the circle); saturation and value stay."""
    reds, greens, blues = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    turn = np.float32(6.0 * shift + 6.0)  # sextants, not below zero
    zero, one, two = np.float32(0), np.float32(1), np.float32(2)
    for i in range(reds.size):
        red, green, blue = reds[i] / WHITE, greens[i] / WHITE, blues[i] / WHITE
        value = max(red, max(green, blue))
        chroma = value - min(red, min(green, blue))
        inverse = one / chroma if chroma > zero else zero
        if value == red:
            sextant = (green - blue) * inverse
        elif value == green:
            sextant = two + (blue - red) * inverse
        else:
            sextant = np.float32(4) + (red - green) * inverse
        sextant += turn
        reds[i] = _channel(value, chroma, sextant + np.float32(5))
        greens[i] = _channel(value, chroma, sextant + np.float32(3))
        blues[i] = _channel(value, chroma, sextant + one)


@_compiled
def blur(planes: Planes, sigma: float) -> None:
    """A 9 x 9 Gaussian of `sigma` pixels, mirrored at the borders; rows first, then columns.

    The crop must be at least 5 pixels high and wide.
    """
    taps = np.exp(-0.5 * (np.arange(REACH + 1) / sigma) ** 2)
    taps /= taps[0] + 2 * taps[1:].sum()
    # Scalars, since the compiler can't know that an array of taps isn't written in the loops.
    t0, t1, t2 = np.float32(taps[0]), np.float32(taps[1]), np.float32(taps[2])
    t3, t4 = np.float32(taps[3]), np.float32(taps[4])
    half = np.float32(0.5)
    _, height, width = planes.shape
    row = np.empty(width + 2 * REACH, np.float32)
    rows = np.empty((height + 2 * REACH, width), np.float32)
    for channel in range(3):
        plane = planes[channel]
        for y in range(height):
            row[REACH : REACH + width] = plane[y]
            for j in range(1, REACH + 1):
                row[REACH - j] = plane[y, j]
                row[REACH + width - 1 + j] = plane[y, width - 1 - j]
            target = rows[REACH + y]
            for x in range(width):
                total = t0 * row[x + 4] + t1 * (row[x + 3] + row[x + 5])
                total += t2 * (row[x + 2] + row[x + 6]) + t3 * (row[x + 1] + row[x + 7])
                target[x] = total + t4 * (row[x] + row[x + 8])
        for j in range(1, REACH + 1):
            rows[REACH - j] = rows[REACH + j]
            rows[REACH + height - 1 + j] = rows[REACH + height - 1 - j]
        for y in range(height):
            target = plane[y]
            for x in range(width):
                total = t0 * rows[y + 4, x] + t1 * (rows[y + 3, x] + rows[y + 5, x])
                total += t2 * (rows[y + 2, x] + rows[y + 6, x])
                total += t3 * (rows[y + 1, x] + rows[y + 7, x])
                total += t4 * (rows[y, x] + rows[y + 8, x])
                target[x] = np.float32(np.int32(total + half))


@_compiled
def solarize(planes: Planes, threshold: int) -> None:
    """Inverts the levels from `threshold` up."""
    values, least = planes.reshape(-1), np.float32(threshold)
    for i in range(values.size):
        level = values[i]
        above = np.float32(level >= least)
        values[i] = level + above * (WHITE - level - level)
