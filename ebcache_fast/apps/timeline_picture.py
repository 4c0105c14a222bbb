"""A run as a picture: its steps in order, and below them the same steps as long as they take."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from textwrap import shorten
from typing import TYPE_CHECKING

from ebcache_fast.apps.pictures import FAINT, INK, MARGIN, PAPER, STEP_COLOURS, STEP_MEANINGS
from ebcache_fast.apps.timeline import Span, Timeline

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

WIDTH, SMOOTH = 1240, 3  # of the steps in pixels; how much finer slanted edges are drawn
CELLS, FAN, BAR = 30, 74, 56  # heights: the steps in order, what joins them, the steps to scale
SAVED, TINT = "#eef0f3", 0.30  # the ground of what caching saves; how much colour what joins both rows has
LEGEND_LINE, SQUARE = 24, 14


@dataclass(frozen=True)
class Stripe:
    """Span as drawn: its place in the upper row and in the lower one, in pixels from the left."""

    colour: str
    steps: int
    above: tuple[float, float]
    below: tuple[float, float]


def draw_timeline(timeline: Timeline, title: str) -> "Image.Image":
    """Steps in order as equal cells, each joined to its place in a bar to scale; says what the scale is."""
    from PIL import Image, ImageDraw, ImageFont

    large, medium, small = (ImageFont.load_default(size) for size in (26, 17, 14))
    costs = timeline.by_type()
    top = 104 + LEGEND_LINE * len(costs) + 44  # of the cells
    sheet = Image.new("RGB", (WIDTH + 2 * MARGIN, top + CELLS + FAN + BAR + 62), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 20), title, INK, large)
    draw.text((MARGIN, 58), _what_is_drawn(timeline), FAINT, medium)
    for line, text in enumerate(_legend(timeline)):
        y = 98 + LEGEND_LINE * line
        draw.rectangle((MARGIN, y + 2, MARGIN + SQUARE, y + SQUARE + 2), STEP_COLOURS[costs[line].step_type])
        draw.text((MARGIN + SQUARE + 10, y), text, INK, small)
    steps = len(timeline.step_types)
    _ruler(draw, [(i + 0.5, str(i + 1)) for i in _round_steps(steps)], steps, top - 24, "step", small)
    whole = max(timeline.uncached or 0.0, timeline.end)
    sheet.paste(_strips(_stripes(timeline.spans, whole), timeline.end / whole * WIDTH), (MARGIN, top))
    below = top + CELLS + FAN + BAR
    _saving(draw, timeline, below - BAR, medium)
    _ruler(draw, [(at, f"{at:g}") for at in _round_numbers(whole)], whole, below + 8, timeline.unit, small)
    return sheet


def _stripes(spans: Sequence[Span], whole: float) -> list[Stripe]:
    """The place of each span; ``whole`` is what the width stands for."""
    cell, done, found = WIDTH / sum(len(span.step_types) for span in spans), 0, []
    for span in spans:
        steps = len(span.step_types)
        colour = STEP_COLOURS[span.step_types[0] if len(set(span.step_types)) == 1 else "MIXED"]
        below = span.start / whole * WIDTH, (span.start + span.cost) / whole * WIDTH
        found.append(Stripe(colour, steps, (done * cell, (done + steps) * cell), below))
        done += steps
    return found


def _strips(stripes: Sequence[Stripe], end: float) -> "Image.Image":
    """Draw both rows and what joins them, finer, and then reduce them, so that slants are smooth."""
    from PIL import Image, ImageDraw

    height = CELLS + FAN + BAR
    fine = Image.new("RGB", (WIDTH * SMOOTH, height * SMOOTH), PAPER)
    draw = ImageDraw.Draw(fine)

    def box(left: float, top: float, right: float, bottom: float, colour: str) -> None:
        """Fill a box that is at least one of the fine pixels wide: a step that takes next to nothing stays in sight."""
        start = min(round(left * SMOOTH), WIDTH * SMOOTH - 1)
        draw.rectangle((start, top * SMOOTH, max(start, right * SMOOTH - 1), bottom * SMOOTH - 1), colour)

    if end < WIDTH:
        box(end, CELLS + FAN, WIDTH, height, SAVED)
    for stripe in stripes:
        (a, b), (c, d) = stripe.above, stripe.below
        shape = [(a, CELLS), (b, CELLS), (d, CELLS + FAN), (c, CELLS + FAN)]
        draw.polygon([(x * SMOOTH, y * SMOOTH) for x, y in shape], _tinted(stripe.colour))
    for stripe in stripes:
        (a, b), (c, d) = stripe.above, stripe.below
        cell = (b - a) / stripe.steps
        for i in range(stripe.steps):
            box(a + i * cell, 0, a + (i + 1) * cell - min(2.0, cell / 4), CELLS, stripe.colour)
        box(c, CELLS + FAN, d - min(1.0, (d - c) / 4), height, stripe.colour)
    return fine.resize((WIDTH, height), Image.Resampling.LANCZOS)


def _tinted(colour: str) -> tuple[int, ...]:
    from PIL import ImageColor

    pairs = zip(ImageColor.getrgb(colour), ImageColor.getrgb(PAPER), strict=True)
    return tuple(round(TINT * ours + (1 - TINT) * ground) for ours, ground in pairs)


def _what_is_drawn(timeline: Timeline) -> str:
    facts = (str(timeline.about[key]) for key in ("model", "table", "device") if timeline.about.get(key))
    about = shorten(", ".join(facts), 80, placeholder=" …")  # a table's path may be long
    if timeline.unit == "ms":
        return f"Measured, {timeline.end:.4g} ms in all" + (f": {about}" if about else "")
    return "Drawn from the plan by multiply-accumulates (MACs), not measured" + (f": {about}" if about else "")


def _legend(timeline: Timeline) -> Iterator[str]:
    for cost in timeline.by_type():
        steps = f"{cost.steps} step{'s' * (cost.steps != 1)} of {round(cost.median, 3):.4g} {timeline.unit}"
        median = " (median)" if timeline.unit == "ms" and cost.steps > 1 else ""
        yield f"{cost.step_type} {STEP_MEANINGS[cost.step_type]}: {steps}{median}"


def _saving(draw: "ImageDraw.ImageDraw", timeline: Timeline, top: int, font: "Font") -> None:
    """Say what caching saves, in the room that it leaves, if it leaves enough."""
    if not timeline.uncached:
        return
    left_over = min(1.0, timeline.end / timeline.uncached)
    text = f"saved: {1 - left_over:.0%}, a speed-up of up to {1 / left_over:.2f}x"
    left = MARGIN + left_over * WIDTH + 14
    if left + font.getlength(text) < MARGIN + WIDTH:
        draw.text((left, top + BAR / 2), text, INK, font, anchor="lm")


def _ruler(
    draw: "ImageDraw.ImageDraw",
    marks: Sequence[tuple[float, str]],
    whole: float,
    top: int,
    unit: str,
    font: "Font",
) -> None:
    """Draw numbers over the whole width; the last one says what they count."""
    for at, text in marks:
        x = MARGIN + at / whole * WIDTH
        half = font.getlength(text) / 2
        draw.text((min(max(x, MARGIN + half), MARGIN + WIDTH - half), top), text, FAINT, font, anchor="ma")
    draw.text((MARGIN + WIDTH, top), unit, FAINT, font, anchor="ra")


def _round_steps(steps: int) -> list[int]:
    """The first step and every fifth or tenth, where they leave room for the unit's name at the end."""
    every = next(size for size in (1, 5, 10, 50, 100, 500, 1000) if steps <= 20 * size or size == 1000)
    return [i for i in range(steps) if (i == 0 or (i + 1) % every == 0) and (i + 1) / steps < 0.97]


def _round_numbers(whole: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from 0 on, five to ten of them, but for the end."""
    sizes = (digit * 10.0**power for power in count(-9) for digit in (1, 2, 5))
    size = next(size for size in sizes if whole / size <= 10)
    return [round(i * size, 9) for i in range(11) if i * size < 0.95 * whole]
