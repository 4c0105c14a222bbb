"""Which typefaces the embedded default learns from: bold, upright, open, from Debian's font packages.

``python -m bench.default_model.fonts`` prints the faces it finds; ``font_packages.txt`` lists what to install.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FONT_FOLDER = Path("/usr/share/fonts")
HELD_OUT_EVERY = 7
_CAP_HEIGHT = 64  # pixels at which faces are compared

_BOLD = re.compile(r"bold|semibold|extrabold|black|heavy|[-_]b\.|bd\.|_rb\.|negrita|75f|77f", re.IGNORECASE)
_UNWANTED = re.compile(
    r"italic|oblique|slant|inclined|cond|narrow|wide|extended|noto(?!sans-b|serif-b|sansmono-b)|integral|size|nonunicode"
    r"|variants|ellen|jura|bold_?-?it|dyslexic|mono|code|outline|titling|purisa|sawasdee|\[|aenigma|info|sign|cherry|kufi|nastaliq",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Face:
    """One usable typeface: its file and a 26-letter proof, (26, 24, 24) uint8, by which duplicates are found."""

    path: Path
    proof: np.ndarray


def find_faces(folder: Path = FONT_FOLDER) -> list[Face]:
    """Every usable, distinct face below ``folder``, in file-name order."""
    faces: list[Face] = []
    for path in sorted(folder.rglob("*"), key=lambda p: p.name):
        if path.suffix.lower() not in {".ttf", ".otf"} or not _BOLD.search(path.name) or _UNWANTED.search(path.name):
            continue
        proof = _proof(path)
        if proof is not None and all(_distance(proof, face.proof) > 6.0 for face in faces):
            faces.append(Face(path, proof))
    return faces


def split_faces(faces: list[Face]) -> tuple[list[Face], list[Face]]:
    """(training faces, held-out faces): every seventh is held out, for the classifier's test alone."""
    held_out = faces[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return [face for face in faces if all(face is not other for other in held_out)], held_out


def most_typical(faces: list[Face], count: int) -> list[Face]:
    """The ``count`` faces whose proofs are nearest to the mean of all, in the order given."""
    mean = np.mean([face.proof for face in faces], axis=0)
    nearest = sorted(faces, key=lambda face: float(np.abs(face.proof - mean).mean()))[:count]
    return [face for face in faces if any(face is near for near in nearest)]


def glyph(path: Path, letter: str, cap_height: int = _CAP_HEIGHT) -> np.ndarray:
    """The letter's ink, cropped to its box: (rows, columns) uint8, capitals about ``cap_height`` pixels high."""
    size = cap_height
    for _ in range(2):  # the second pass corrects the face's own ratio of capital height to size
        font = ImageFont.truetype(str(path), size)
        _, top, _, bottom = font.getbbox("H")
        size = max(8, round(size * cap_height / max(1, bottom - top)))
    font = ImageFont.truetype(str(path), size)
    left, top, right, bottom = font.getbbox(letter)
    canvas = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))))
    ImageDraw.Draw(canvas).text((-left, -top), letter, fill=255, font=font)
    return np.asarray(canvas)


def fit(ink: np.ndarray, side: int) -> np.ndarray:
    """Ink centred in a square that it fills to 80%, resampled to (side, side) uint8."""
    box = int(max(ink.shape) / 0.8)
    square = Image.new("L", (box, box))
    square.paste(Image.fromarray(ink), ((box - ink.shape[1]) // 2, (box - ink.shape[0]) // 2))
    return np.asarray(square.resize((side, side), Image.Resampling.BOX))


def _proof(path: Path) -> np.ndarray | None:
    try:
        inks = [glyph(path, letter) for letter in LETTERS]
    except OSError:
        return None
    heights = np.array([ink.shape[0] for ink in inks])
    fills = np.array([ink.mean() / 255 for ink in inks])
    usable = heights.min() > 0.8 * _CAP_HEIGHT and heights.max() < 1.5 * _CAP_HEIGHT and 0.3 < fills.mean() < 0.75
    proof = np.stack([fit(ink, 24) for ink in inks])
    distinct = len({letter.tobytes() for letter in proof}) == len(LETTERS)
    return proof if usable and distinct else None


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float32) - b).mean())


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for found in find_faces():
        print(found.path)
