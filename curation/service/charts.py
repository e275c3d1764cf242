"""Line charts as numbers for a plain SVG: no script draws here, so that the page needs none."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400.0, 130.0
TICKS = 3
SAME = 1e-4  # relative: smaller steps are noise, and their labels all alike


@dataclass(frozen=True)
class Chart:
    """A line in a box of WIDTH x HEIGHT. `ticks`: (height in the box, label) of the y axis."""

    title: str
    last: str
    line: str
    ticks: tuple[tuple[float, str], ...]
    first_x: str
    last_x: str
    at: tuple[float, float]  # the last point


def chart(title: str, points: Sequence[tuple[int, float]], percent: bool = False) -> Chart:
    """`points`: (iteration, value), rising in iterations."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    ticks = _ticks(min(ys), max(ys))
    low, high = min(ticks[0], *ys), max(ticks[-1], *ys)
    across = (xs[-1] - xs[0]) or 1

    def place(x: int, y: float) -> tuple[float, float]:
        height = (high - y) / ((high - low) or 1) * HEIGHT
        return round((x - xs[0]) / across * WIDTH, 2), round(height, 2)

    places = [place(x, y) for x, y in points]
    if len(places) == 1:
        places.append((WIDTH, places[0][1]))
    return Chart(
        title=title,
        last=_label(ys[-1], percent),
        line=" ".join(f"{x:g},{y:g}" for x, y in places),
        ticks=tuple((place(xs[0], y)[1], _tick(y, ticks[1] - ticks[0], percent)) for y in ticks),
        first_x=f"{xs[0]:,}",
        last_x=f"{xs[-1]:,}",
        at=places[-1],
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round values between which all of them lie."""
    if high - low <= SAME * abs(high):
        low, high = sorted((0.0, 2 * high)) if high else (0.0, 1.0)
    rough = (high - low) / TICKS
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough)
    first = math.floor(low / step)
    return [round(n * step, 12) for n in range(first, math.ceil(high / step) + 1)]


def _tick(value: float, step: float, percent: bool) -> str:
    """With as many digits as the steps between ticks need."""
    if percent:
        return f"{100 * value:g} %"
    if step < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.{max(0, -math.floor(math.log10(step)))}f}"


def _label(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:.3g} %"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
