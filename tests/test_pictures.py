"""Pictures, pixel by pixel: what a sample, a grid and a strip of steps look like."""

from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from ebcache_fast.apps import pictures
from ebcache_fast.apps.pictures import Row, comparison, grid, save_picture, to_pixels
from ebcache_fast.errors import JobError

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
NAMES = {ImageColor.getrgb(colour): name for name, colour in pictures.STEP_COLOURS.items()}
BY_CODE = {(red << 16) + (green << 8) + blue: name for (red, green, blue), name in NAMES.items()}
WHITE_CODE = 0xFFFFFF


def flat(*colours: tuple[float, float, float], height: int = 1, width: int = 1) -> torch.Tensor:
    """One picture of each colour, every pixel alike."""
    return torch.tensor(colours)[:, :, None, None].expand(-1, -1, height, width)


def test_pixel_values() -> None:
    values = torch.tensor([-1.0, 0.0, 1.0, -7.0, 7.0, -0.5, 0.25])
    pixels = to_pixels(values.reshape(1, 1, 1, -1))
    assert pixels.dtype == torch.uint8
    assert pixels.flatten().tolist() == [0, 128, 255, 0, 255, 64, 159]


def test_pixels_have_their_channels_last() -> None:
    images = torch.arange(24.0).reshape(1, 3, 2, 4) / 12 - 1
    pixels = to_pixels(images)
    assert pixels.shape == (1, 2, 4, 3)
    assert pixels[0, 1, 2].tolist() == to_pixels(images[:, :, 1:2, 2:3]).flatten().tolist()


def test_a_grid_is_exact() -> None:
    """Three pictures, one pixel high and two wide, in two columns, enlarged twice."""
    images = torch.zeros(3, 3, 1, 2) - 1
    images[0, 0, 0, 0] = 1  # the first one's left pixel red
    images[1, 1] = 1  # the second green
    images[2, 2, 0, 1] = 1  # the third one's right pixel blue
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    gap = [WHITE] * pictures.GAP
    top = [red, red, BLACK, BLACK, *gap, *[green] * 4]
    blank = [WHITE] * len(top)
    bottom = [BLACK, BLACK, blue, blue, *gap, *[WHITE] * 4]
    expected = [top, top, *[blank] * pictures.GAP, bottom, bottom]
    assert np.array_equal(np.asarray(grid(images, columns=2, scale=2)), np.array(expected))


def test_a_grid_wider_than_its_pictures() -> None:
    sheet = grid(flat((1, 1, 1), (-1, -1, -1), height=4, width=4), columns=5, scale=3)
    assert sheet.size == (5 * (12 + pictures.GAP) - pictures.GAP, 12)
    assert sheet.getpixel((12 + pictures.GAP, 0)) == BLACK
    assert sheet.getpixel((2 * (12 + pictures.GAP), 0)) == WHITE


def strips(sheet: Image.Image) -> list[list[str]]:
    """The step types of every coloured strip in a picture, from the top, however high a strip is."""
    codes = np.asarray(sheet).astype(np.int64) @ [1 << 16, 1 << 8, 1]  # (H, W)
    nothing_else = np.isin(codes, [WHITE_CODE, *BY_CODE]).all(axis=1)
    lines = [[BY_CODE[code] for code, _ in groupby(line) if code in BY_CODE] for line in codes[nothing_else].tolist()]
    return [line for line, _ in groupby(lines) if line]


def row(name: str, *step_types: str, count: int = 2) -> Row:
    return Row(name, "a note", step_types, flat(*[(-1.0, -1.0, -1.0)] * count, height=2, width=2))


def test_strips_say_what_each_step_was() -> None:
    first = ("NO_CACHE", "ATTN_MLP", "ATTN_MLP", "ATTENTION", "MLP", "MIXED", "NO_CACHE")
    second = ("NO_CACHE", "NO_CACHE", "NO_CACHE")
    *_, upper, lower = strips(comparison("title", "below", [row("a", *first), row("b", *second)], columns=2))
    assert upper == list(first)
    assert lower == list(second)


def test_the_legend_has_the_types_that_occur() -> None:
    legend, _ = strips(comparison("title", "below", [row("a", "NO_CACHE", "ATTN_MLP", "NO_CACHE")], columns=2))
    assert legend == ["NO_CACHE", "ATTN_MLP"]
    assert pictures.STEP_COLOURS.keys() == pictures.STEP_MEANINGS.keys()
    assert len(NAMES) == len(pictures.STEP_COLOURS)  # no two alike


def test_fewer_steps_make_a_shorter_strip() -> None:
    sheet = np.asarray(comparison("title", "below", [row("a", *["NO_CACHE"] * 8), row("b", "MLP", "MLP")], columns=2))
    widths = {
        name: max(int((sheet == colour).all(axis=2).sum(axis=1).max()) for colour, n in NAMES.items() if n == name)
        for name in ("NO_CACHE", "MLP")
    }
    assert widths["MLP"] == pytest.approx(widths["NO_CACHE"] / 4, abs=4)


def test_each_method_shows_its_own_samples() -> None:
    rows = [
        Row("a", "", ("NO_CACHE",), flat((1, -1, -1), (1, -1, -1), height=5, width=5)),
        Row("b", "", ("NO_CACHE",), flat((-1, -1, 1), height=5, width=5)),
    ]
    sheet = np.asarray(comparison("title", "below", rows, columns=2, scale=3))
    red, blue = ((sheet == colour).all(axis=2) for colour in ((255, 0, 0), (0, 0, 255)))
    assert (red.sum(), blue.sum()) == (2 * 15 * 15, 15 * 15)
    assert np.flatnonzero(red.any(axis=1)).max() < np.flatnonzero(blue.any(axis=1)).min()


def test_no_text_is_cut_off() -> None:
    """One tiny sample under long words: the margin at the right stays empty."""
    for title, subtitle, name in (("W" * 60, "", ""), ("", "W" * 80, ""), ("", "", "W" * 90)):
        sheet = np.asarray(comparison(title, subtitle, [row(name, "NO_CACHE", count=1)], columns=1))
        assert (sheet[:, -pictures.MARGIN // 2 :] == 255).all()
        assert (sheet[:, : pictures.MARGIN // 2] == 255).all()


def test_more_steps_than_pixels() -> None:
    """A run of 1000 steps still has its strip."""
    steps = ["NO_CACHE", *["ATTN_MLP"] * 999]
    assert strips(comparison("title", "below", [row("a", *steps, count=1)], columns=1))


def test_a_picture_is_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    sheet = grid(flat((0.5, 0, -0.5), (1, -1, 1), height=3, width=3), columns=2)
    save_picture(sheet, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as found:
        assert found.format == "PNG"
        assert np.array_equal(np.asarray(found), np.asarray(sheet))
    with pytest.raises(JobError, match=r"a\.png"):
        save_picture(sheet, tmp_path / "a.png" / "b.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
