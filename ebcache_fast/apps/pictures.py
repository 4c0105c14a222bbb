"""Pictures for people: a grid of samples, and methods one under another with their Cache Tables as coloured strips."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ebcache_fast.plan.files import replacing

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PAPER, INK, FAINT = "#ffffff", "#1b1f24", "#6b7280"
STEP_COLOURS = {
    "NO_CACHE": "#1f4e79",
    "ATTENTION": "#e59f2e",
    "MLP": "#8c6bb1",
    "ATTN_MLP": "#9fd3c7",
    "SELF_ATTENTION": "#f2c57c",
    "CROSS_ATTENTION": "#c8553d",
    "SELF_ATTN_MLP": "#5fa777",
    "CROSS_ATTN_MLP": "#d58fb5",
    "KEEP": "#2b6ca3",
    "FORECAST": "#b5e2fa",
    "MIXED": "#999999",
}
STEP_MEANINGS = {
    "NO_CACHE": "computes everything",
    "ATTENTION": "reuses attention",
    "MLP": "reuses the MLP",
    "ATTN_MLP": "reuses attention and MLP",
    "SELF_ATTENTION": "reuses self-attention",
    "CROSS_ATTENTION": "reuses cross-attention",
    "SELF_ATTN_MLP": "reuses self-attention and MLP",
    "CROSS_ATTN_MLP": "reuses cross-attention and MLP",
    "KEEP": "computes everything, for forecasts",
    "FORECAST": "forecasts all layers",
    "MIXED": "differs by layer",
}
MARGIN, STRIP_HEIGHT, GAP = 28, 14, 3
SQUARE, SPACE = 14, 16  # of the legend, and between texts on one line


@dataclass(frozen=True)
class Row:
    """Method in the picture: what to call it, a line about it, its step types and its samples."""

    name: str
    note: str
    step_types: tuple[str, ...]
    images: Tensor  # (N, 3, H, W) in [-1, 1]


def to_pixels(images: Tensor) -> Tensor:
    """Pictures (N, C, H, W) in [-1, 1] -> (N, H, W, C) uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)


def grid(images: Tensor, columns: int, scale: int = 2) -> "Image.Image":
    """Samples side by side, row by row, each enlarged ``scale`` times with sharp pixels."""
    from PIL import Image

    n, _, height, width = images.shape
    cell = (width * scale, height * scale)
    sheet = Image.new("RGB", (columns * (cell[0] + GAP) - GAP, -(-n // columns) * (cell[1] + GAP) - GAP), PAPER)
    for k, pixels in enumerate(to_pixels(images)):
        tile = Image.fromarray(pixels.numpy()).resize(cell, Image.Resampling.NEAREST)
        sheet.paste(tile, (k % columns * (cell[0] + GAP), k // columns * (cell[1] + GAP)))
    return sheet


def comparison(title: str, subtitle: str, rows: Sequence[Row], columns: int, scale: int = 2) -> "Image.Image":
    """Draw each method's samples under its name, with one coloured cell for every step it ran."""
    from PIL import Image, ImageDraw, ImageFont

    large, medium, small = (ImageFont.load_default(size) for size in (26, 17, 14))
    grids = [grid(row.images, columns, scale) for row in rows]
    lengths = [large.getlength(title), medium.getlength(subtitle), _legend_length(rows, small)]
    lengths += [medium.getlength(row.name) + SPACE + small.getlength(row.note) for row in rows]
    width = ceil(max(*lengths, *(g.width for g in grids)))  # few columns must not cut off what stands above them
    block = [g.height + STRIP_HEIGHT + 62 for g in grids]
    sheet = Image.new("RGB", (width + 2 * MARGIN, 150 + sum(block)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 20), title, INK, large)
    draw.text((MARGIN, 56), subtitle, FAINT, medium)
    _legend(draw, rows, 92, small)
    cell = width / max(len(row.step_types) for row in rows)
    top = 130
    for row, tiles, height in zip(rows, grids, block, strict=True):
        draw.text((MARGIN, top), row.name, INK, medium)
        indent = MARGIN + medium.getlength(row.name) + SPACE
        draw.text((indent, top + 2), row.note, FAINT, small)
        _strip(draw, row.step_types, (MARGIN, top + 26), cell)
        sheet.paste(tiles, (MARGIN, top + 26 + STRIP_HEIGHT + 5))
        top += height
    return sheet


def save_picture(picture: "Image.Image", path: Path) -> None:
    """Write a PNG, whole or not at all; JobError where it can't be written."""
    with replacing(path) as partial:
        picture.save(partial, format="PNG", optimize=True)


def _legend(draw: "ImageDraw.ImageDraw", rows: Sequence[Row], top: int, font: "Font") -> None:
    left = float(MARGIN)
    for kind, text in _entries(rows):
        draw.rectangle((left, top + 2, left + SQUARE, top + SQUARE + 1), STEP_COLOURS[kind])
        draw.text((left + SQUARE + SPACE / 2, top), text, INK, font)
        left += _entry_length(text, font)


def _legend_length(rows: Sequence[Row], font: "Font") -> float:
    return sum(_entry_length(text, font) for _, text in _entries(rows))


def _entry_length(text: str, font: "Font") -> float:
    return SQUARE + SPACE / 2 + font.getlength(text) + 1.5 * SPACE


def _entries(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The step types that occur, and what the legend says of them."""
    used = {kind for row in rows for kind in row.step_types}
    return [(kind, f"{kind}: {meaning}") for kind, meaning in STEP_MEANINGS.items() if kind in used]


def _strip(draw: "ImageDraw.ImageDraw", step_types: Sequence[str], corner: tuple[int, int], cell: float) -> None:
    """Draw a cell for each step, the first executed at the left: fewer steps make a shorter strip."""
    for i, kind in enumerate(step_types):
        left = corner[0] + i * cell
        draw.rectangle((left, corner[1], left + max(0, cell - 2), corner[1] + STRIP_HEIGHT - 1), STEP_COLOURS[kind])
