"""Scenes: shapes, words and numbers on a loose grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from avlprof.tasks.pages.canvas import FACES, GRID, PATCH, SIDE, Canvas, Face, blurred, draw_shape, pale
from avlprof.tasks.pages.quiz import Quiz, pick
from avlprof.tasks.pages.words import COLORS, NUMBERS, SHAPES, WORDS, listed, with_article

_GRIDS = ((3, 3), (3, 3), (4, 3), (3, 4), (2, 3), (4, 2), (2, 2))
_THIRD = SIDE / 3
_UNSURE = 0.09  # of a third: so near a border between parts of the picture nobody is asked where a thing is
_SAMPLED = 3  # every third pixel of a patch decides what it shows,
_ENOUGH = 3  # and so many of them are enough


@dataclass(frozen=True)
class Thing:
    """A shape, a word or a number, with its cell and the middle and half height of what was drawn."""

    kind: str
    value: str
    color: str
    row: int
    column: int
    x: float
    y: float
    radius: float

    @property
    def is_shape(self) -> bool:
        return self.kind == "shape"

    @property
    def name(self) -> str:
        """`red star`, or `word apple`."""
        return f"{self.color} {self.value}" if self.is_shape else f"{self.kind} {self.value}"

    @property
    def short(self) -> str:
        """`a red star`, or `the word apple`."""
        return with_article(self.name) if self.is_shape else f"the {self.name}"

    @property
    def full(self) -> str:
        """`a red star`, or `the word apple in red`."""
        return self.short if self.is_shape else f"{self.short} in {self.color}"


@dataclass(frozen=True)
class _Style:
    """What all things of a scene have in common."""

    shapes: tuple[str, ...]
    colors: tuple[str, ...]
    words: list[str]
    text_share: float
    face: str


def scene(rng: Random) -> tuple[Canvas, Quiz]:
    """Draw a scene and ask about it."""
    canvas = Canvas(pale(rng))
    rows, columns = rng.choice(_GRIDS)
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    cells = sorted(rng.sample(cells, min(len(cells), rng.randint(3, 9))))
    style = _Style(
        SHAPES if rng.random() < 0.5 else tuple(rng.sample(SHAPES, 4)),
        COLORS if rng.random() < 0.5 else tuple(rng.sample(COLORS, 4)),
        rng.sample(WORDS, 12),
        rng.choice([0.15, 0.35, 0.5]),
        rng.choice(FACES),
    )
    owners = Image.new("L", (SIDE, SIDE), 0)
    size = (SIDE / columns, SIDE / rows)
    things = [
        _placed(rng, canvas, owners, style, (cell, number), size)
        for number, cell in enumerate(cells, start=1)
    ]
    _label_shapes(canvas, things, _owners_of_patches(owners))
    quiz = Quiz(rng)
    _ask(quiz, things)
    return canvas, quiz


def _placed(
    rng: Random,
    canvas: Canvas,
    owners: Image.Image,
    style: _Style,
    place: tuple[tuple[int, int], int],
    size: tuple[float, float],
) -> Thing:
    """Draw one thing into its cell of `size`; `place` is the cell and the thing's number from 1 on."""
    (row, column), number = place
    width, height = size
    left, top = column * width, row * height
    color = rng.choice(style.colors)
    if rng.random() < style.text_share:
        points = rng.randint(14, 24)
        if rng.random() < 0.35:
            kind, value = "number", str(rng.randint(10, 9999))
        else:
            word = style.words[number - 1]
            kind, value = "word", pick(rng, word, word.upper(), word.capitalize())
        name = style.face if rng.random() < 0.6 else rng.choice(FACES)
        face = Face(name, points).fitted(value, width - 8, 12)
        wide = face.width(value)
        x = left + 4 + rng.random() * max(0, width - 8 - wide)
        y = top + face.size + 4 + rng.random() * (height - face.size - 14)
        canvas.text((x, y), value, face, blurred(rng, color, 10), number)
        return Thing(kind, value, color, row, column, x + wide / 2, y - 0.36 * face.size, face.size * 0.5)
    value = rng.choice(style.shapes)
    radius = rng.uniform(13, min(width, height) * 0.4)
    x = left + radius * 1.15 + 2 + rng.random() * (width - 2.3 * radius - 4)
    y = top + radius * 1.15 + 2 + rng.random() * (height - 2.3 * radius - 4)
    draw_shape(value, (canvas.draw, x, y, radius, blurred(rng, color).rgb, canvas.ground))
    draw_shape(value, (ImageDraw.Draw(owners), x, y, radius, number, 0))
    return Thing("shape", value, color, row, column, x, y, radius)


def _owners_of_patches(owners: Image.Image) -> NDArray[np.int64]:
    """Number of the shape that each patch shows enough of, `[GRID, GRID]`."""
    pixels = np.asarray(owners).reshape(GRID, PATCH, GRID, PATCH)[:, 1::_SAMPLED, :, 1::_SAMPLED]
    patches = pixels.transpose(0, 2, 1, 3).reshape(GRID, GRID, -1)
    return np.where((patches > 0).sum(-1) >= _ENOUGH, patches.max(-1), 0).astype(np.int64)


def _label_shapes(canvas: Canvas, things: list[Thing], owners: NDArray[np.int64]) -> None:
    for number, thing in enumerate(things, start=1):
        if thing.is_shape:
            free = (owners == number) & (canvas.labels.kind == 0)
            canvas.labels.mark(free, thing.value, thing.color, number)


# --- questions


def _ask(quiz: Quiz, things: list[Thing]) -> None:
    shapes = [thing for thing in things if thing.is_shape]
    texts = [thing for thing in things if not thing.is_shape]
    _ask_looks(quiz, shapes)
    for thing in things:
        if sum(other.name == thing.name for other in things) == 1:
            _ask_position(quiz, thing)
            _ask_neighbours(quiz, thing, things)
    _ask_texts(quiz, texts)
    if shapes:
        _ask_counts(quiz, shapes)
        _ask_exists(quiz, shapes)
        _ask_bigger(quiz, shapes)
    _ask_lists(quiz, things, shapes, texts)
    rows: dict[int, list[str]] = {}
    for thing in things:
        rows.setdefault(thing.row, []).append(thing.full)
    parts = [f"In row {number} there is {listed(row)}." for number, row in enumerate(rows.values(), start=1)]
    quiz.ask(
        "describe",
        " ".join(parts),
        "Describe the picture.",
        "Describe everything in reading order.",
        "What do you see? Describe it row by row.",
        "Give a full description of the image.",
    )


def _ask_looks(quiz: Quiz, shapes: list[Thing]) -> None:
    for thing in shapes:
        if sum(other.value == thing.value for other in shapes) == 1:
            name = thing.value
            quiz.ask(
                "color_of_shape",
                thing.color,
                f"What color is the {name}?",
                f"What is the color of the {name}?",
                f"Which color does the {name} have?",
                f"Name the color of the {name}.",
            )
        if sum(other.color == thing.color for other in shapes) == 1:
            color = thing.color
            quiz.ask(
                "shape_of_color",
                thing.value,
                f"What shape is {color}?",
                f"Which shape is {color}?",
                f"Name the {color} shape.",
                f"What is the shape of the {color} object?",
            )


def _ask_position(quiz: Quiz, thing: Thing) -> None:
    x, y = thing.x / _THIRD, thing.y / _THIRD
    if min(abs(place - border) for place in (x, y) for border in (1, 2)) > _UNSURE:
        across, down = ("left", "", "right")[int(x)], ("top", "", "bottom")[int(y)]
        quiz.ask(
            "position",
            f"{down} {across}".strip() or "center",
            f"Where is the {thing.name}?",
            f"In which part of the picture is the {thing.name}?",
            f"What is the position of the {thing.name}?",
            f"Where can you see the {thing.name}?",
        )


def _ask_neighbours(quiz: Quiz, thing: Thing, things: list[Thing]) -> None:
    sides: dict[str, Callable[[Thing], bool]] = {
        "right": lambda other: other.row == thing.row and other.column > thing.column,
        "left": lambda other: other.row == thing.row and other.column < thing.column,
        "below": lambda other: other.column == thing.column and other.row > thing.row,
        "above": lambda other: other.column == thing.column and other.row < thing.row,
    }
    for side in ("right", "left"):
        there = [other for other in things if sides[side](other)]
        if quiz.chance(0.5) and (there or quiz.chance(0.25)):
            nearest = min(there, key=lambda other: abs(other.column - thing.column), default=None)
            quiz.ask(
                f"{side}_of",
                nearest.short if nearest else "nothing",
                f"What is to the {side} of the {thing.name}?",
                f"What is next to the {thing.name} on the {side}?",
                f"Which thing is directly {side} of the {thing.name}?",
            )
    for side in ("below", "above"):
        there = [other for other in things if sides[side](other)]
        if there and quiz.chance(0.4):
            quiz.ask(
                side,
                min(there, key=lambda other: abs(other.row - thing.row)).short,
                f"What is {side} the {thing.name}?",
                f"What do you see directly {side} the {thing.name}?",
                f"Which thing is {side} the {thing.name}?",
            )


def _ask_texts(quiz: Quiz, texts: list[Thing]) -> None:
    for thing in texts:
        kind, color, value = thing.kind, thing.color, thing.value
        if sum((other.kind, other.color) == (kind, color) for other in texts) == 1:
            quiz.ask(
                f"read_{kind}",
                value,
                f"What {kind} is written in {color}?",
                f"Read the {color} {kind}.",
                f"Which {kind} is {color}?",
                f"What is the {color} {kind}?",
            )
        quiz.ask(
            "color_of_text",
            color,
            f"What color is the {kind} {value}?",
            f"In which color is {value} written?",
            f"What is the color of {value}?",
        )


def _ask_counts(quiz: Quiz, shapes: list[Thing]) -> None:
    rng = quiz.rng
    shape = rng.choice(shapes).value if quiz.chance(0.8) else rng.choice(SHAPES)
    plural = f"{shape}{'es' if shape == 'cross' else 's'}"
    quiz.ask(
        "count_shape",
        NUMBERS[sum(other.value == shape for other in shapes)],
        f"How many {plural} are there?",
        f"Count the {plural}.",
        f"What is the number of {plural}?",
    )
    color = rng.choice(shapes).color if quiz.chance(0.85) else rng.choice(COLORS)
    quiz.ask(
        "count_color",
        NUMBERS[sum(other.color == color for other in shapes)],
        f"How many {color} shapes are there?",
        f"Count the {color} shapes.",
        f"How many shapes are {color}?",
    )
    quiz.ask(
        "count_all",
        NUMBERS[len(shapes)],
        "How many shapes are in the picture?",
        "Count all the shapes.",
        "What is the number of shapes here?",
    )


def _ask_exists(quiz: Quiz, shapes: list[Thing]) -> None:
    rng = quiz.rng
    for _ in range(2):
        thing = rng.choice(shapes)
        shape, color = thing.value, thing.color
        if not quiz.chance(0.5):
            other_color, other_shape = rng.choice(COLORS), rng.choice(SHAPES)
            shape, color = ((shape, other_color), (other_shape, color))[rng.randrange(2)]
        name = with_article(f"{color} {shape}")
        quiz.ask(
            "exists",
            "yes" if any((other.value, other.color) == (shape, color) for other in shapes) else "no",
            f"Is there {name}?",
            f"Can you see {name}?",
            f"Does the picture show {name}?",
        )


def _ask_bigger(quiz: Quiz, shapes: list[Thing]) -> None:
    single = [thing for thing in shapes if sum(other.name == thing.name for other in shapes) == 1]
    if len(single) < 2:
        return
    one, two = quiz.rng.sample(single, 2)
    if max(one.radius, two.radius) > 1.3 * min(one.radius, two.radius):
        quiz.ask(
            "bigger",
            f"the {(one if one.radius > two.radius else two).name}",
            f"Which is bigger, the {one.name} or the {two.name}?",
            f"Which one is larger: the {one.name} or the {two.name}?",
        )


def _ask_lists(quiz: Quiz, things: list[Thing], shapes: list[Thing], texts: list[Thing]) -> None:
    color = quiz.rng.choice(things).color
    quiz.ask(
        "list_color",
        listed([thing.short for thing in things if thing.color == color]),
        f"List everything that is {color}.",
        f"Which things are {color}?",
        f"Name all {color} things in reading order.",
    )
    if len(texts) > 1:
        quiz.ask(
            "list_texts",
            ", ".join(thing.value for thing in texts),
            "Read all the words and numbers.",
            "What text is in the picture?",
            "List every word and number in reading order.",
        )
    if len(shapes) > 1:
        quiz.ask(
            "list_shapes",
            ", ".join(thing.name for thing in shapes),
            "List all the shapes in reading order.",
            "Which shapes are in the picture?",
            "Name every shape from top left to bottom right.",
        )
