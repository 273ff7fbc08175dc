"""Tables: a header, rows that have a name, and columns of words and numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from avlprof.tasks.pages.canvas import FACES, PAINTS, SIDE, Canvas, Face, Ink, gray, pale
from avlprof.tasks.pages.quiz import Quiz, clock
from avlprof.tasks.pages.words import (
    CITIES,
    COLORS,
    COMPANIES,
    COMPANY_ENDINGS,
    FIRST_NAMES,
    NUMBERS,
    PRODUCTS,
    STATES,
    WORDS,
)


def _short(words: tuple[str, ...], most: int = 7) -> list[str]:
    return [word for word in words if len(word) <= most]


_PRODUCTS = tuple(product.capitalize() for product in PRODUCTS)
_NAMES: dict[str, list[str]] = {
    "Item": _short(_PRODUCTS),
    "Name": list(FIRST_NAMES),
    "City": _short(CITIES),
    "Team": _short(COMPANIES),
    "Day": ["Monday", "Tuesday", "Friday", "Sunday", "Saturday", "Thursday"],
}
"""What the rows of a table may be called, by the head of the first column."""

_ASKED: dict[str, tuple[str, ...]] = {
    "Item": _PRODUCTS,
    "Name": FIRST_NAMES,
    "City": CITIES,
    "Team": COMPANIES,
    "Day": ("Monday", "Friday", "Sunday"),
}
"""Names that may be asked for, whether they are in the table or not."""

_CELLS: dict[str, Callable[[Random], str]] = {
    "Price": lambda rng: f"${rng.randint(2, 999)}",
    "Qty": lambda rng: str(rng.randint(1, 99)),
    "Color": lambda rng: rng.choice(COLORS),
    "Score": lambda rng: str(rng.randint(1, 100)),
    "Code": lambda rng: rng.choice("ABCDEFGHKLMNPRSTUVXYZ") + str(rng.randint(10, 999)),
    "City": lambda rng: rng.choice(_short(CITIES)),
    "Age": lambda rng: str(rng.randint(18, 99)),
    "Size": lambda rng: rng.choice(["small", "large", "tall", "wide", "short"]),
    "Status": lambda rng: rng.choice(_short(STATES)),
    "Year": lambda rng: str(rng.randint(1950, 2029)),
    "Word": lambda rng: rng.choice(_short(WORDS, 6)),
    "Time": clock,
}
_NUMERIC = ("Price", "Qty", "Score", "Age", "Year")
_MARGIN = 8  # pixels that a table leaves free in all, beside it
_SHADED = ("blue", "green", "purple")  # heads that are written in white when they are filled


@dataclass(frozen=True)
class _Grid:
    """What a table holds: the head of each column, and the cells of each row."""

    heads: list[str]
    cells: list[list[str]]
    title: str

    @property
    def names(self) -> list[str]:
        return [row[0] for row in self.cells]

    def column(self, index: int) -> list[str]:
        return [row[index] for row in self.cells]


@dataclass(frozen=True)
class _Measures:
    """Faces of cells and heads, pixels before each text, and widths of the columns."""

    face: Face
    head: Face
    pad: int
    widths: list[float]


def table(rng: Random) -> tuple[Canvas, Quiz]:
    """Draw a table and ask about it."""
    canvas = Canvas(pale(rng))
    rows, columns = rng.randint(2, 6), rng.randint(2, 4)
    kind = rng.choice(list(_NAMES))
    names = rng.sample(_NAMES[kind], rows)
    kinds = [head for head in _CELLS if head != kind]
    heads = rng.sample(kinds, columns - 1)
    cells = [[name, *(_CELLS[head](rng) for head in heads)] for name in names]
    heads = [kind, *heads]
    name = rng.choice(FACES[:5])
    bold = name
    if not name.endswith("Bold") and rng.random() < 0.8:
        bold = f"{name}-Bold"
    size = rng.randint(12, 15)
    titles = (
        "",
        f"{rng.choice(WORDS).capitalize()} {rng.choice(['list', 'table', 'report', 'plan'])}",
        f"{rng.choice(COMPANIES)} {rng.choice(COMPANY_ENDINGS)}",
        f"{kind} table {rng.randint(1, 99)}",
    )
    grid = _Grid(heads, cells, titles[rng.randrange(4)])
    _draw(rng, canvas, grid, _measures(grid, Face(name, size), Face(bold, size), rng.randint(7, 16)))
    quiz = Quiz(rng)
    _ask_cells(quiz, grid)
    _ask_extremes(quiz, grid)
    _ask_whole(quiz, grid)
    return canvas, quiz


def _measures(grid: _Grid, face: Face, head: Face, pad: int) -> _Measures:
    """Widths of the columns, with less space and then smaller letters where they do not fit."""
    while True:
        widths = [
            max(head.width(title), max(face.width(cell) for cell in grid.column(index))) + pad
            for index, title in enumerate(grid.heads)
        ]
        if sum(widths) < SIDE - _MARGIN or (pad <= 7 and face.size <= 11):
            return _Measures(face, head, pad, widths)
        if pad > 7:
            pad -= 1
        else:
            face, head = Face(face.name, face.size - 1), Face(head.name, head.size - 1)


def _draw(rng: Random, canvas: Canvas, grid: _Grid, measures: _Measures) -> None:
    rows, columns, size = len(grid.cells), len(grid.heads), measures.face.size
    extra = rng.random() * max(0, (SIDE - _MARGIN - sum(measures.widths))) / columns
    widths = [width + extra for width in measures.widths]
    left = 4 + rng.random() * max(0, SIDE - _MARGIN - sum(widths))
    y = rng.randint(6, 14)
    if rng.random() < 0.7:
        y += rng.randint(0, max(0, int(SIDE - 60 - (rows + 1) * (size + 10) - y)))
    if grid.title:
        face = Face(FACES[1], rng.randint(15, 19))
        canvas.text((max(4, left), y + face.size), grid.title, face, gray(15), 1)
        y += face.size + rng.randint(8, 16)
    pitch = min(size + rng.randint(8, 22), (SIDE - y - 6) / (rows + 1))
    head_ink = _fill_head(rng, canvas, (left, y, left + sum(widths), y + pitch))
    edges = [left]
    for width in widths:
        edges.append(edges[-1] + width)
    _rule(canvas, edges, (y, pitch, rows), rng.random() < 0.65)
    for row, texts in enumerate([grid.heads, *grid.cells]):
        base = y + row * pitch + pitch / 2 + 0.36 * size
        face, ink = (measures.face, gray(20)) if row else (measures.head, head_ink)
        for column, text in enumerate(texts):
            at = (edges[column] + measures.pad / 2, base)
            canvas.text(at, text, face, ink, 2 + row * columns + column)


def _fill_head(rng: Random, canvas: Canvas, edges: tuple[float, float, float, float]) -> Ink:
    """Shade the header, or not; returns the ink for its text."""
    color = rng.choice([None, "gray", "blue", "green", "orange", "purple"])
    if color is None:
        return gray(15)
    light = rng.random() < 0.5
    r, g, b = (int(value * 0.35 + 255 * 0.65) if light else value for value in PAINTS[color])
    canvas.box(edges, "panel", Ink((r, g, b), color))
    return gray(15) if light or color not in _SHADED else gray(255, "white")


def _rule(canvas: Canvas, edges: list[float], lines: tuple[float, float, int], grid: bool) -> None:
    """Draw the lines: those of the header, or all; `lines` are first line, distance and number of rows."""
    y, pitch, rows = lines
    for line in range(rows + 2):
        if grid or line < 2:
            at = y + line * pitch
            canvas.draw.line((edges[0], at, edges[-1], at), fill=(110, 110, 110))
    if grid:
        for x in edges:
            canvas.draw.line((x, y, x, y + (rows + 1) * pitch), fill=(110, 110, 110))


# --- questions


def _ask_cells(quiz: Quiz, grid: _Grid) -> None:
    rng, names, columns, kind = quiz.rng, grid.names, len(grid.heads), grid.heads[0].lower()
    for _ in range(5):
        row, column = rng.randrange(len(names)), rng.randrange(1, columns)
        head, name = grid.heads[column].lower(), names[row]
        quiz.ask(
            "cell",
            grid.cells[row][column],
            f"What is the {head} of {name}?",
            f"What is the {head} for {name}?",
            f"Which {head} does {name} have?",
            f"Look up the {head} of {name}.",
        )
    single = {question.answer + question.prompt: question for question in quiz.questions}
    quiz.questions[:] = single.values()
    for _ in range(2):
        row, column = rng.randrange(len(names)), rng.randrange(columns)
        quiz.ask(
            "cell_rc",
            grid.cells[row][column],
            f"What is in row {row + 1}, column {column + 1}?",
            f"Read the cell at row {row + 1} and column {column + 1}.",
        )
        column = rng.randrange(1, columns)
        head, value = grid.heads[column].lower(), grid.cells[row][column]
        if grid.column(column).count(value) == 1:
            quiz.ask(
                "row_of_value",
                names[row],
                f"Which {kind} has the {head} {value}?",
                f"Whose {head} is {value}?",
            )


def _ask_extremes(quiz: Quiz, grid: _Grid) -> None:
    kind = grid.heads[0].lower()
    for column, head in enumerate(grid.heads[1:], start=1):
        if head not in _NUMERIC:
            continue
        values = [int(value.strip("$")) for value in grid.column(column)]
        for group, most, other, chosen in (
            ("max_in_col", "highest", "largest", max(values)),
            ("min_in_col", "lowest", "smallest", min(values)),
        ):
            if values.count(chosen) == 1:
                quiz.ask(
                    group,
                    grid.names[values.index(chosen)],
                    f"Which {kind} has the {most} {head.lower()}?",
                    f"Who or what has the {other} {head.lower()}?",
                )


def _ask_whole(quiz: Quiz, grid: _Grid) -> None:
    rng, names, kind = quiz.rng, grid.names, grid.heads[0]
    quiz.ask(
        "count_rows",
        NUMBERS[len(names)],
        "How many rows does the table have, without the header?",
        "Count the rows below the header.",
    )
    quiz.ask(
        "count_cols", NUMBERS[len(grid.heads)], "How many columns does the table have?", "Count the columns."
    )
    quiz.ask(
        "headers",
        ", ".join(grid.heads),
        "What are the column headers?",
        "Read the header row.",
        "List the columns of the table.",
    )
    row = rng.randrange(len(names))
    quiz.ask(
        "read_row",
        ", ".join(grid.cells[row]),
        f"Read the row of {names[row]}.",
        f"What does the row for {names[row]} say?",
    )
    column = rng.randrange(len(grid.heads))
    head = grid.heads[column]
    quiz.ask(
        "read_col",
        ", ".join(grid.column(column)),
        f"Read the {head.lower()} column.",
        f"List all values under {head}.",
    )
    row = rng.randrange(len(names) - 1)
    quiz.ask(
        "next_row",
        names[row + 1],
        f"What comes below {names[row]}?",
        f"Which {kind.lower()} is listed after {names[row]}?",
    )
    asked = rng.choice(names) if quiz.chance(0.5) else rng.choice(_ASKED[kind])
    quiz.ask(
        "in_table",
        "yes" if asked in names else "no",
        f"Is {asked} in the table?",
        f"Does the table list {asked}?",
    )
    if grid.title:
        wordings = "What is the title of the table?", "Read the title above the table."
        quiz.ask("table_title", grid.title, *wordings)
    quiz.ask(
        "read_table",
        "\n".join(" | ".join(row) for row in [grid.heads, *grid.cells]),
        "Read the whole table.",
        "Transcribe the table row by row.",
        "What does the table say?",
    )
