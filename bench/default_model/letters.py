"""The data: capital letters on a coloured ground, shaded and mildly textured, drawn from a bank of rendered glyphs.

An image is ``ground + mask * (ink - ground)``, where ground and ink are random, well separated colours, each shaded
along one random direction, plus a faint low-frequency texture. All is 24x24 RGB in [-1, 1].
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from bench.default_model.fonts import LETTERS, glyph

SIDE = 24
_MAX_WIDTH = 21.0  # pixels; wide letters are made smaller
_MIN_SEPARATION = 0.8  # of mean luminance between ink and ground, on a scale of 2


@dataclass(frozen=True)
class Jitter:
    """How much a face's letters vary in the bank."""

    variants: int
    cap_pixels: tuple[float, float]  # range of capital heights in the image
    shift: float  # pixels, either way


NARROW = Jitter(variants=4, cap_pixels=(15.5, 17.0), shift=0.6)  # what the model learns to draw
WIDE = Jitter(variants=8, cap_pixels=(14.5, 18.0), shift=1.2)  # what its judge learns to read


@dataclass(frozen=True)
class GlyphBank:
    """Masks of every face and letter in several sizes and places."""

    masks: Tensor  # (faces, letters, variants, SIDE, SIDE) uint8

    @property
    def letters(self) -> int:
        return self.masks.shape[1]

    def draw(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """One image for each label (N,) int64 -> (N, 3, SIDE, SIDE) float32 in [-1, 1]."""
        n = len(labels)
        faces, _, variants = self.masks.shape[:3]
        face = torch.randint(faces, (n,), generator=generator)
        variant = torch.randint(variants, (n,), generator=generator)
        mask = self.masks[face, labels, variant].unsqueeze(1).float() / 255  # (N, 1, H, W)
        ground, ink = _separated_colours(n, generator)  # (N, 3, 1, 1) each
        ground = ground + _shading(n, 0.25, generator)
        ink = ink + _shading(n, 0.25, generator)
        image = ground + mask * (ink - ground) + _texture(n, 0.04, generator)
        return image.clamp(-1, 1)


def render_bank(paths: list[Path], jitter: Jitter, seed: int = 0) -> GlyphBank:
    """Render every letter of every face in random sizes and places, four times oversampled."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((len(paths), len(LETTERS), jitter.variants, SIDE, SIDE), dtype=np.uint8)
    for f, path in enumerate(paths):
        for i, letter in enumerate(LETTERS):
            ink = Image.fromarray(glyph(path, letter, cap_height=96))
            for v in range(jitter.variants):
                masks[f, i, v] = _place(ink, jitter, rng)
    return GlyphBank(torch.from_numpy(masks))


def _place(ink: Image.Image, jitter: Jitter, rng: np.random.Generator) -> np.ndarray:
    scale = min(rng.uniform(*jitter.cap_pixels) / 96, _MAX_WIDTH / ink.width) * 4
    size = (max(1, round(ink.width * scale)), max(1, round(ink.height * scale)))
    shift = rng.uniform(-jitter.shift, jitter.shift, size=2)
    corner = [round((SIDE * 4 - extent) / 2 + offset * 4) for extent, offset in zip(size, shift, strict=True)]
    canvas = Image.new("L", (SIDE * 4, SIDE * 4))
    canvas.paste(ink.resize(size, Image.Resampling.BOX), (corner[0], corner[1]))
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX))


def _separated_colours(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two colours a row, uniform in the cube until their luminances differ enough: pushed apart where they don't."""
    a, b = torch.rand(2, n, 3, 1, 1, generator=generator).mul(1.6).sub(0.8)
    gap = (b - a).mean(dim=1, keepdim=True)  # (N, 1, 1, 1)
    lacking = (_MIN_SEPARATION - gap.abs()).clamp_min(0) / 2
    push = torch.where(gap >= 0, lacking, -lacking)
    return a - push, b + push


def _shading(n: int, strength: float, generator: torch.Generator) -> Tensor:
    """A linear ramp along a random direction, (N, 1, SIDE, SIDE)."""
    axis = torch.linspace(-1, 1, SIDE)
    slope_x, slope_y = (torch.rand(2, n, 1, 1, 1, generator=generator) - 0.5) * 2 * strength
    return slope_x * axis.view(1, 1, 1, -1) + slope_y * axis.view(1, 1, -1, 1)


def _texture(n: int, strength: float, generator: torch.Generator) -> Tensor:
    """Smooth colour noise on a 6x6 grid, (N, 3, SIDE, SIDE)."""
    coarse = torch.randn(n, 3, 6, 6, generator=generator) * strength
    return F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
