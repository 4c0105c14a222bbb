"""Quality against cost as a picture: a point for each method, joined by policy, on logarithmic axes."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ebcache_fast.apps.compare import Result
from ebcache_fast.apps.pictures import FAINT, INK, MARGIN, PAPER

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

WIDTH, HEIGHT, LEGEND = 860, 520, 250  # of the axes, and beside them
COLOURS = ("#1f4e79", "#e59f2e", "#5fa777", "#c8553d", "#8c6bb1", "#2a9d8f", "#6b7280", "#d58fb5", "#264653")
DOT, SMOOTH = 6, 3  # radius of a point; how much finer it is drawn
DIGITS = (1, 2, 5)


@dataclass(frozen=True)
class Point:
    """Method in the picture."""

    series: str
    speedup: float  # by MACs
    error: float  # paired


def points_of(results: Sequence[Result]) -> list[Point]:
    """Points of the results but for the first, whose paired error is 0; nothing of those drawn with other noise."""
    return [
        Point(_series(result), result.mac_limit, result.paired_error)
        for result in results[1:]
        if result.paired_error > 0 and result.noise != "other noise"
    ]


def draw_frontier(points: Sequence[Point], title: str) -> "Image.Image":
    """The picture of at least one point."""
    from PIL import Image, ImageDraw, ImageFont

    large, medium, small = (ImageFont.load_default(size) for size in (26, 17, 14))
    across, up = (_axis([getattr(point, name) for point in points]) for name in ("speedup", "error"))
    corner = MARGIN + 60, 96
    size = corner[0] + WIDTH + LEGEND, corner[1] + HEIGHT + 70
    fine = Image.new("RGB", (size[0] * SMOOTH, size[1] * SMOOTH), PAPER)
    draw = ImageDraw.Draw(fine)

    def at(point: Point) -> tuple[float, float]:
        x = corner[0] + WIDTH * _share(point.speedup, across)
        return x * SMOOTH, (corner[1] + HEIGHT * (1 - _share(point.error, up))) * SMOOTH

    for tick in _ticks(across):
        x = (corner[0] + WIDTH * _share(tick, across)) * SMOOTH
        draw.line((x, corner[1] * SMOOTH, x, (corner[1] + HEIGHT) * SMOOTH), "#eef0f3", SMOOTH)
    for tick in _ticks(up):
        y = (corner[1] + HEIGHT * (1 - _share(tick, up))) * SMOOTH
        draw.line((corner[0] * SMOOTH, y, (corner[0] + WIDTH) * SMOOTH, y), "#eef0f3", SMOOTH)
    series: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        series[point.series].append(point)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(series)}
    for name, members in series.items():
        line = [at(point) for point in sorted(members, key=lambda point: point.speedup)]
        draw.line(line, colours[name], 2 * SMOOTH)
        for x, y in line:
            radius = DOT * SMOOTH
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), colours[name])
    sheet = fine.resize(size, Image.Resampling.LANCZOS)
    _write(ImageDraw.Draw(sheet), title, corner, (across, up), colours, (large, medium, small))
    return sheet


def _write(
    draw: "ImageDraw.ImageDraw",
    title: str,
    corner: tuple[int, int],
    axes: tuple[tuple[float, float], tuple[float, float]],
    colours: dict[str, str],
    fonts: "tuple[Font, Font, Font]",
) -> None:
    (across, up), (large, medium, small) = axes, fonts
    draw.text((MARGIN, 20), title, INK, large)
    draw.text(
        (MARGIN, 58),
        "Error against the uncached sample of the same noise; lower and further right is better",
        FAINT,
        medium,
    )
    for tick in _ticks(across):
        x = corner[0] + WIDTH * _share(tick, across)
        draw.text((x, corner[1] + HEIGHT + 8), f"{tick:g}x", FAINT, small, anchor="ma")
    for tick in _ticks(up):
        y = corner[1] + HEIGHT * (1 - _share(tick, up))
        draw.text((corner[0] - 8, y), f"{tick:g}", FAINT, small, anchor="rm")
    draw.text(
        (corner[0] + WIDTH, corner[1] + HEIGHT + 34), "speed-up by multiply-accumulates", FAINT, small, anchor="ra"
    )
    for i, (name, colour) in enumerate(colours.items()):
        y = corner[1] + 10 + 26 * i
        draw.ellipse((corner[0] + WIDTH + 24, y, corner[0] + WIDTH + 36, y + 12), colour)
        draw.text((corner[0] + WIDTH + 46, y + 6), name, INK, small, anchor="lm")


def _series(result: Result) -> str:
    """Name of a policy, without its budget; fewer steps of a sampler are one."""
    name, _, budget = result.name.rpartition(", ")
    if budget.endswith("x") and name:
        return name
    first, _, rest = result.name.partition(" ")
    return f"fewer {rest.removeprefix('of ')}" if first.isdigit() else result.name


def _axis(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis, with some room."""
    low, high = math.log(min(values)), math.log(max(values))
    room = max(0.08 * (high - low), 0.05)
    return low - room, high + room


def _share(value: float, axis: tuple[float, float]) -> float:
    return (math.log(value) - axis[0]) / (axis[1] - axis[0])


def _ticks(axis: tuple[float, float]) -> list[float]:
    """Round numbers within an axis: 1, 2 and 5 times powers of ten, or finer ones where these are too few."""
    powers = range(math.floor(axis[0] / math.log(10)), math.ceil(axis[1] / math.log(10)) + 1)
    for digits in (DIGITS, (1, 1.5, 2, 3, 4, 5, 7), [i / 10 for i in range(10, 100)]):
        found = [digit * 10.0**power for power in powers for digit in digits]
        inside = [round(value, 9) for value in found if axis[0] <= math.log(value) <= axis[1]]
        if len(inside) >= 3:
            return inside
    return inside
