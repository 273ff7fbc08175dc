"""A square sheet to draw on, which keeps account of what each of its patches shows.

The drawing is what a model sees; the account (`PatchLabels`) is what its vision tower learns from.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from avlprof.tasks.pages.words import COLORS, OTHER_WORD, SHAPES, known_word

SIDE: Final = 336
PATCH: Final = 14
GRID: Final = SIDE // PATCH
SLOTS: Final = 4
"""Characters that are told apart within a patch; what comes after them in it has no label."""
RANKS: Final = 40
"""Places in reading order that are told apart; later ones count as the last."""

FACES: Final = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
)
CHARACTERS: Final = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;-/$%&()#'@+!?\"_="
KINDS: Final = ("background", "text", *SHAPES, "bar", "line", "panel")
RGB = tuple[int, int, int]
PAINTS: Final[dict[str, RGB]] = {
    "red": (214, 32, 32),
    "orange": (250, 140, 10),
    "yellow": (238, 212, 20),
    "green": (30, 150, 50),
    "blue": (35, 75, 215),
    "purple": (130, 40, 165),
    "pink": (250, 130, 185),
    "brown": (125, 75, 35),
    "gray": (132, 132, 132),
    "black": (18, 18, 18),
}
_CHARACTER = {character: number for number, character in enumerate(CHARACTERS, start=1)}
_KIND = {kind: number for number, kind in enumerate(KINDS)}
_COLOR = {color: number for number, color in enumerate((*COLORS, "white"), start=1)}
_MIDDLE = 0.36  # of a letter's size: how far its middle lies above the baseline
_SLACK = 8  # pixels of a patch that a box must reach, and one more below and to the right


class Face(NamedTuple):
    """A typeface at a size in pixels."""

    name: str
    size: int

    def width(self, text: str) -> float:
        """Pixels that a line of text takes."""
        advances = _advances(*self)
        return sum(advances.get(character, self.size * 0.6) for character in text)

    def fitted(self, text: str, room: float, least: int) -> Face:
        """The same typeface, as much smaller as the text needs to fit; not below the size `least`."""
        face = self
        while face.width(text) > room and face.size > least:
            face = Face(face.name, face.size - 1)
        return face


class Ink(NamedTuple):
    """A colour as it is painted, and the name that it has in labels and answers."""

    rgb: RGB
    color: str


@dataclass(frozen=True)
class PatchLabels:
    """What each patch shows; arrays of `[GRID, GRID]`, 0 where there is nothing.

    kind: index in `KINDS`. color: 1 to 10 for `COLORS`, 11 for white. characters `[GRID, GRID, SLOTS]`:
    1 + index in `CHARACTERS`, from left to right. word: as in `known_word`. rank: reading order.
    """

    kind: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((GRID, GRID), np.uint8))
    color: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((GRID, GRID), np.uint8))
    characters: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((GRID, GRID, SLOTS), np.uint8))
    word: NDArray[np.int16] = field(default_factory=lambda: np.zeros((GRID, GRID), np.int16))
    rank: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((GRID, GRID), np.uint8))

    def mark(self, where: Any, kind: str, color: str, rank: int) -> None:
        """Say of some patches what they show."""
        self.kind[where], self.color[where] = _KIND[kind], _COLOR[color]
        self.rank[where] = min(rank, RANKS - 1)


class Canvas:
    """A sheet of one ground colour. What is drawn first keeps a patch's label, except under text."""

    def __init__(self, ground: RGB) -> None:
        self.ground = ground
        self.image = Image.new("RGB", (SIDE, SIDE), ground)
        self.draw = ImageDraw.Draw(self.image)
        self.labels = PatchLabels()

    def text(self, at: tuple[float, float], words: str, face: Face, ink: Ink, rank: int) -> float:
        """Write a line with its left edge and baseline at `at`; returns its right edge."""
        x, y = at
        self.draw.text((x, y), words, font=_font(*face), fill=ink.rgb, anchor="ls")
        row = int((y - _MIDDLE * face.size) // PATCH)
        if not 0 <= row < GRID:
            return x
        advances = _advances(*face)
        numbers = [known_word(word) for word in words.split(" ")]
        shares: dict[int, dict[int, int]] = {}  # of a patch's characters, by word
        word = 0
        for character in words:
            advance = advances.get(character, face.size * 0.6)
            column = int((x + advance / 2) // PATCH)
            if character == " ":
                word += 1
            elif 0 <= column < GRID:
                share = shares.get(column)
                if share is None:
                    share = shares[column] = {}
                    self._begin_text(row, column, ink.color, rank)
                self._add_character(row, column, character)
                share[word] = share.get(word, 0) + 1
            x += advance
        for column, share in shares.items():
            most = max(share, key=lambda index: (share[index], -index))
            self.labels.word[row, column] = numbers[most] if most < len(numbers) else OTHER_WORD
        return x

    def _begin_text(self, row: int, column: int, color: str, rank: int) -> None:
        if self.labels.kind[row, column] != _KIND["text"]:
            self.labels.characters[row, column] = 0
        self.labels.mark((row, column), "text", color, rank)

    def _add_character(self, row: int, column: int, character: str) -> None:
        slots = self._slots(row, column)
        if slots < SLOTS:
            self.labels.characters[row, column, slots] = _CHARACTER.get(character, 0)

    def _slots(self, row: int, column: int) -> int:
        return int((self.labels.characters[row, column] > 0).sum())

    def box(self, edges: tuple[float, float, float, float], kind: str, ink: Ink, rank: int = 0) -> None:
        """Fill a rectangle (left, top, right, bottom)."""
        self.draw.rectangle(edges, fill=ink.rgb)
        left, top, right, bottom = edges
        first, last = _patches(left, right)
        upper, lower = _patches(top, bottom)
        if last > first and lower > upper:
            free = np.zeros((GRID, GRID), bool)
            free[upper:lower, first:last] = self.labels.kind[upper:lower, first:last] == 0
            self.labels.mark(free, kind, ink.color, rank)


def _patches(start: float, end: float) -> tuple[int, int]:
    first = max(0, math.ceil((start - _SLACK) / PATCH))
    return first, min(GRID, math.floor((end + _SLACK - 1) / PATCH))


@functools.lru_cache(maxsize=128)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=128)
def _advances(name: str, size: int) -> dict[str, float]:
    font = _font(name, size)
    return {character: font.getlength(character) for character in f"{CHARACTERS} "}


# --- colours


def blurred(rng: Random, color: str, spread: int = 14) -> Ink:
    """A paint that is a little off its plain colour."""
    r, g, b = (max(0, min(255, value + rng.randint(-spread, spread))) for value in PAINTS[color])
    return Ink((r, g, b), color)


def gray(level: int, color: str = "black") -> Ink:
    """A shade of gray."""
    return Ink((level, level, level), color)


def pale(rng: Random) -> RGB:
    """A ground colour close to white."""
    level = rng.randint(238, 255)
    r, g, b = (min(255, level + rng.randint(-6, 6)) for _ in range(3))
    return r, g, b


# --- shapes

Paint = RGB | int
Pen = tuple[ImageDraw.ImageDraw, float, float, float, Paint, Paint]
"""What to draw with, middle, radius, colour, and the colour of the ground behind."""


def draw_shape(name: str, pen: Pen) -> None:
    """Draw one of `SHAPES`."""
    _SHAPES[name](*pen)


def _corners(
    x: float, y: float, r: float, count: int, turn: float = 0.0, inner: float = 0.0
) -> list[tuple[float, float]]:
    """Corners of a regular polygon, or with `inner` of a star."""
    points, steps = [], count * (2 if inner else 1)
    for step in range(steps):
        angle = turn + 2 * math.pi * step / steps - math.pi / 2
        reach = r * (inner if inner and step % 2 else 1)
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return points


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Paint) -> None:
    draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def _circle(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Paint, ground: Paint) -> None:
    _disc(draw, x, y, r, fill)


def _ring(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Paint, ground: Paint) -> None:
    _disc(draw, x, y, r, fill)
    _disc(draw, x, y, r * 0.52, ground)


def _square(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Paint, ground: Paint) -> None:
    half = r * 0.86
    draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)


def _rectangle(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Paint, ground: Paint) -> None:
    draw.rectangle((x - r * 1.1, y - r * 0.55, x + r * 1.1, y + r * 0.55), fill=fill)


def _triangle(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Paint, ground: Paint) -> None:
    draw.polygon(_corners(x, y + r * 0.15, r * 1.1, 3), fill=fill)


def _diamond(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Paint, ground: Paint) -> None:
    draw.polygon([(x, y - r * 1.1), (x + r * 0.8, y), (x, y + r * 1.1), (x - r * 0.8, y)], fill=fill)


def _star(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Paint, ground: Paint) -> None:
    draw.polygon(_corners(x, y, r * 1.12, 5, inner=0.42), fill=fill)


def _hexagon(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Paint, ground: Paint) -> None:
    draw.polygon(_corners(x, y, r, 6, turn=math.pi / 6), fill=fill)


def _cross(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Paint, ground: Paint) -> None:
    arm = r * 0.36
    draw.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
    draw.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)


def _arrow(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Paint, ground: Paint) -> None:
    draw.rectangle((x - r, y - r * 0.28, x + r * 0.1, y + r * 0.28), fill=fill)
    draw.polygon([(x, y - r * 0.8), (x + r, y), (x, y + r * 0.8)], fill=fill)


def _heart(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Paint, ground: Paint) -> None:
    lobe, top = r * 0.54, y - r * 0.85
    draw.ellipse((x - 2 * lobe, top, x, top + 2 * lobe), fill=fill)
    draw.ellipse((x, top, x + 2 * lobe, top + 2 * lobe), fill=fill)
    draw.polygon([(x - 1.9 * lobe, y - r * 0.12), (x + 1.9 * lobe, y - r * 0.12), (x, y + r)], fill=fill)


def _moon(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Paint, ground: Paint) -> None:
    _disc(draw, x, y, r, fill)
    draw.ellipse((x - r * 0.3, y - r * 0.95, x + r * 1.5, y + r * 0.85), fill=ground)


_SHAPES: dict[str, Callable[..., None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "hexagon": _hexagon,
    "cross": _cross,
    "ring": _ring,
    "arrow": _arrow,
    "heart": _heart,
    "moon": _moon,
    "rectangle": _rectangle,
}
