"""The embedded picture world: coloured shapes, short words and numbers on a 3 x 3 grid.

A `Scene` is the ground truth (what stands where), `render` draws it, and `patch_labels`
tells a vision tower what every patch of the drawing shows. Everything follows from a
seed, so a split of the data is a range of seeds and nothing has to be downloaded.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 34, 34),
    "green": (24, 150, 44),
    "blue": (38, 70, 220),
    "orange": (245, 140, 20),
    "purple": (134, 40, 160),
    "pink": (250, 120, 190),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
LETTERS = "ABCEFGHKLMNPRSTUVXYZ"
DIGITS = "0123456789"
KINDS = ("shape", "word", "number")
CELLS = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
IMAGE_SIZE = 112
PATCH_SIZE = 8
_FONTS = ("DejaVuSansMono-Bold.ttf", "DejaVuSans-Bold.ttf")
_LIGHTEST = 232  # the darkest ground of a picture
_INK_OF_A_LABEL = 5.0  # pixels of full ink before a patch counts as showing an item
_GLYPHS = {name: i + 1 for i, name in enumerate((*SHAPES, *LETTERS, *DIGITS))}


@dataclass(frozen=True)
class Item:
    """One thing in a picture: `value` is a shape's name, a word or a number, in `color`."""

    cell: int
    kind: str
    value: str
    color: str

    @property
    def name(self) -> str:
        """The item without its place, as answers write it: `red circle`, `blue word CAT`."""
        return (
            f"{self.color} {self.value}" if self.kind == "shape" else f"{self.color} {self.kind} {self.value}"
        )


@dataclass(frozen=True)
class Frame:
    """Width and height of a picture in pixels, multiples of `PATCH_SIZE`; `zoom` scales its items alone."""

    width: int = IMAGE_SIZE
    height: int = IMAGE_SIZE
    zoom: float = 1.0


@dataclass(frozen=True)
class Scene:
    """Items in reading order, the seed of the drawing's free choices (jitter, font), and its frame."""

    items: tuple[Item, ...]
    seed: tuple[int, ...]
    frame: Frame = Frame()


def sampled_frame(seed: tuple[int, ...]) -> Frame:
    """A frame of 88 to 168 pixels a side, each side drawn by itself."""
    width, height = np.random.default_rng((*seed, 3)).integers(11, 22, size=2)
    return Frame(PATCH_SIZE * int(width), PATCH_SIZE * int(height))


def sample_scene(
    seed: tuple[int, ...],
    items: tuple[int, int] = (3, 6),
    text_share: float = 0.5,
    frame: Frame | None = None,
) -> Scene:
    """Draw a scene with a number of items in the closed range `items`.

    `text_share` is the chance that an item is a word or a number instead of a shape. The items do
    not depend on the `frame`.
    """
    rng = np.random.default_rng(seed)
    count = int(rng.integers(items[0], items[1] + 1))
    cells = sorted(int(c) for c in rng.choice(len(CELLS), size=count, replace=False))
    drawn = []
    for cell in cells:
        color = str(rng.choice(list(COLORS)))
        if rng.random() >= text_share:
            kind, value = "shape", str(rng.choice(SHAPES))
        elif rng.random() < 0.6:
            kind, value = "word", "".join(rng.choice(list(LETTERS), size=3))
        else:
            kind, value = "number", "".join(rng.choice(list(DIGITS), size=int(rng.integers(2, 4))))
        drawn.append(Item(cell, kind, value, color))
    return Scene(tuple(drawn), tuple(seed), frame or Frame())


def render(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, in the size of its frame (`IMAGE_SIZE` pixels square by itself)."""
    return _draw(scene)[0]


def is_drawn(picture: Image.Image) -> bool:
    """Whether a picture looks like one of `render`: a light grey ground and the ink of `COLORS`.

    Size does not count. Of the pixels, most are of one tone, and of the others most are pure ink; the
    rest are the blurred edges.
    """
    pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    codes, counts = np.unique(_codes(pixels), return_counts=True)
    tone = int(codes[counts.argmax()])
    tones = tone >> 16, tone >> 8 & 255, tone & 255
    if min(tones) < _LIGHTEST or len(set(tones)) > 1 or counts.max() < 0.7 * len(pixels):
        return False
    pure = np.isin(codes, _codes(np.array(list(COLORS.values()), dtype=np.uint8)))
    return bool(counts[pure].sum() >= 0.1 * (len(pixels) - counts.max()))


def _codes(pixels: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """A number for each colour of `[n, 3]`, in the order of colours."""
    red, green, blue = pixels.astype(np.uint32).T
    codes: NDArray[np.uint32] = (red << 16) + (green << 8) + blue
    return codes


def patch_labels(scene: Scene) -> tuple[Image.Image, NDArray[np.int64]]:
    """The picture and, for each patch in row-major order, what it shows.

    Returns the image and an array `[patches, 5]`: kind (0 = background, then `KINDS`),
    colour, glyph (shape or character), index of a character in its text, and rank of the
    item in reading order; every column is 0 on background.
    """
    return _draw(scene)


def label_sizes() -> tuple[int, int, int, int, int]:
    """Number of classes in each column of `patch_labels`."""
    return len(KINDS) + 1, len(COLORS) + 1, len(_GLYPHS) + 1, 4, len(CELLS) + 1


def _draw(scene: Scene) -> tuple[Image.Image, NDArray[np.int64]]:
    rng = np.random.default_rng((*scene.seed, 1))
    tone = int(rng.integers(_LIGHTEST, 256))
    frame = scene.frame
    picture = Image.new("RGB", (frame.width, frame.height), (tone, tone, tone))
    rows, columns = frame.height // PATCH_SIZE, frame.width // PATCH_SIZE
    owner = np.zeros((rows * columns, 5), dtype=np.int64)
    most = np.full(rows * columns, _INK_OF_A_LABEL)
    for rank, item in enumerate(scene.items):
        glyphs = [(round(x * frame.zoom), _zoomed(mask, frame.zoom)) for x, mask in _glyphs(item, rng)]
        width = max(x + m.width for x, m in glyphs)
        height = max(m.height for _, m in glyphs)
        left = _jittered(item.cell % 3, frame.width, width, rng)
        top = _jittered(item.cell // 3, frame.height, height, rng)
        for index, (x, mask) in enumerate(glyphs):
            picture.paste(COLORS[item.color], (left + x, top), mask)
            ink = np.zeros((frame.height, frame.width), dtype=np.float32)
            ink[top : top + mask.height, left + x : left + x + mask.width] = np.asarray(mask) / 255.0
            ink = ink.reshape(rows, PATCH_SIZE, columns, PATCH_SIZE).sum(axis=(1, 3)).reshape(-1)
            glyph = _GLYPHS[item.value if item.kind == "shape" else item.value[index]]
            label = (KINDS.index(item.kind) + 1, list(COLORS).index(item.color) + 1, glyph, index, rank + 1)
            owner[ink > most] = label
            most = np.maximum(most, ink)
    return picture, owner


def _jittered(third: int, length: int, size: int, rng: np.random.Generator) -> int:
    """Where an item of `size` pixels starts in its third (0 to 2) of a side of `length` pixels."""
    room = length / 3
    slack = max(room - size - 2, 0.0)
    return int(np.clip(round(third * room + 1 + rng.random() * slack), 0, length - size))


def _zoomed(mask: Image.Image, zoom: float) -> Image.Image:
    if zoom == 1.0:
        return mask
    size = (max(round(mask.width * zoom), 1), max(round(mask.height * zoom), 1))
    return mask.resize(size, Image.Resampling.BICUBIC)


def _glyphs(item: Item, rng: np.random.Generator) -> list[tuple[int, Image.Image]]:
    """The masks of an item's glyphs with their x offsets; a shape is one glyph."""
    if item.kind == "shape":
        return [(0, _shape_mask(item.value, int(rng.integers(17, 27))))]
    font = _font(str(rng.choice(_FONTS)), int(rng.integers(13, 15)))
    glyphs, x = [], 0.0
    for character in item.value:
        advance = font.getlength(character)
        mask = Image.new("L", (int(np.ceil(advance)), 13), 0)
        ImageDraw.Draw(mask).text((0, 12), character, fill=255, font=font, anchor="ls")
        glyphs.append((round(x), mask))
        x += advance
    return glyphs


@functools.lru_cache(maxsize=8)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


@functools.lru_cache(maxsize=128)
def _shape_mask(shape: str, size: int) -> Image.Image:
    scale = 4
    edge = size * scale
    mask = Image.new("L", (edge, edge), 0)
    draw = ImageDraw.Draw(mask)
    third, half = edge / 3, edge / 2
    if shape == "circle":
        draw.ellipse((0, 0, edge - 1, edge - 1), fill=255)
    elif shape == "square":
        draw.rectangle((edge * 0.06, edge * 0.06, edge * 0.94, edge * 0.94), fill=255)
    elif shape == "triangle":
        draw.polygon([(half, 0), (edge, edge), (0, edge)], fill=255)
    elif shape == "diamond":
        draw.polygon([(half, 0), (edge, half), (half, edge), (0, half)], fill=255)
    elif shape == "cross":
        draw.rectangle((third, 0, 2 * third, edge), fill=255)
        draw.rectangle((0, third, edge, 2 * third), fill=255)
    else:
        turn = np.linspace(0, 2 * np.pi, 10, endpoint=False) - np.pi / 2
        radius = np.where(np.arange(10) % 2 == 0, half, half * 0.42)
        points = np.stack([half + radius * np.cos(turn), half + radius * np.sin(turn)], axis=1)
        draw.polygon([(float(x), float(y)) for x, y in points], fill=255)
    return mask.resize((size, size), Image.Resampling.BOX)
