"""Documents: a heading, labelled fields, and at times a paragraph of words."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

from avlprof.tasks.pages.canvas import FACES, SIDE, Canvas, Face, Ink, blurred, gray, pale
from avlprof.tasks.pages.fields import Field, draw_fields, draw_title
from avlprof.tasks.pages.quiz import Quiz
from avlprof.tasks.pages.words import NUMBERS, ORDINALS, WORDS

_WHITE = Ink((255, 255, 255), "white")
_ASKED = ("Date", "Total", "City", "Phone", "Price", "Status", "Item", "Room", "Customer", "Ref")
_LONGEST = 32  # words of a paragraph that is asked for as a whole


@dataclass
class _Sheet:
    """A document while it is written, from top to bottom; `y` is where the next line begins."""

    rng: Random
    dark: bool
    canvas: Canvas
    family: int
    heading: str
    body: str
    left: int = 0
    y: float = 0
    rank: int = 1
    lines: list[str] = field(default_factory=list)

    def ink(self) -> Ink:
        """Light ink on a dark sheet, else mostly black."""
        rng = self.rng
        if self.dark:
            return gray(rng.randint(225, 255), "white")
        if rng.random() < 0.75:
            return gray(rng.randint(0, 45))
        return blurred(rng, rng.choice(["blue", "red", "green", "purple", "brown"]), 8)


@dataclass(frozen=True)
class _Layout:
    """Sizes of the fields and the paragraph, and which of both comes first."""

    size: int
    pitch: int
    small: Face
    small_pitch: int
    paragraph: bool
    aligned: bool
    values: float
    keys: str
    paragraph_first: bool


def document(rng: Random) -> tuple[Canvas, Quiz]:
    """Draw a document and ask about it."""
    sheet = _sheet(rng)
    title = _write_title(sheet)
    fields, size = draw_fields(rng), rng.randint(12, 16)
    layout, fields = _layout(sheet, fields, size)
    words = [rng.choice(WORDS) for _ in range(rng.randint(6, 26))]
    if layout.paragraph_first:
        sheet.rank += 1
        _write_paragraph(sheet, layout, words)
        sheet.y += 6
        fields = fields[: max(2, int((SIDE - sheet.y) // layout.pitch))]
    written = _write_fields(sheet, layout, fields)
    if layout.paragraph and not layout.paragraph_first and sheet.y + 2 * layout.small_pitch < SIDE:
        sheet.y += 6
        sheet.rank += 1
        _write_paragraph(sheet, layout, words)
    quiz = Quiz(rng)
    _ask_fields(quiz, title, written)
    if sheet.lines:
        _ask_paragraph(quiz, " ".join(sheet.lines))
    quiz.ask(
        "read_fields",
        "\n".join([title, *(f"{key}: {value}" for key, value in written)]),
        "Read the title and all the fields.",
        "List the title and every field with its value.",
        "Transcribe the title and the fields.",
    )
    return sheet.canvas, quiz


def _sheet(rng: Random) -> _Sheet:
    dark = rng.random() < 0.1
    canvas = Canvas((rng.randint(20, 45),) * 3 if dark else pale(rng))
    family = rng.choice([0, 0, 2, 2, 4])
    heading = FACES[family + 1 if rng.random() < 0.8 else family]
    body = FACES[family if rng.random() < 0.8 else family + 1]
    left, y = rng.randint(8, 30), rng.randint(6, 18)
    if rng.random() < 0.5:
        y += rng.randint(0, 90)
    return _Sheet(rng, dark, canvas, family, heading, body, left, y)


def _write_title(sheet: _Sheet) -> str:
    rng = sheet.rng
    title = draw_title(rng)
    face = Face(sheet.heading, rng.randint(16, 24)).fitted(title, SIDE - sheet.left - 8, 12)
    ink, x = sheet.ink(), float(sheet.left)
    if rng.random() < 0.2 and not sheet.dark:
        color = rng.choice(["blue", "green", "purple", "black", "brown", "red"])
        sheet.canvas.box((0, 0, SIDE, sheet.y + face.size + 10), "panel", blurred(rng, color))
        ink = _WHITE
    elif rng.random() >= 0.6:
        x = max(sheet.left, (SIDE - face.width(title)) / 2)
    sheet.canvas.text((x, sheet.y + face.size), title, face, ink, sheet.rank)
    sheet.y += face.size + rng.randint(12, 22)
    if rng.random() < 0.35:
        shade = ink.rgb if ink.color != "white" else (120, 120, 120)
        line = (sheet.left, sheet.y - 4, SIDE - sheet.left, sheet.y - 4)
        sheet.canvas.draw.line(line, fill=shade, width=rng.randint(1, 2))
    return title


def _layout(sheet: _Sheet, fields: list[Field], size: int) -> tuple[_Layout, list[Field]]:
    """How the body is laid out, and the fields that have room."""
    rng = sheet.rng
    paragraph = rng.random() < 0.65
    pitch = size + rng.randint(4, 9)
    small = rng.randint(12, 14)
    small_pitch = small + rng.randint(3, 6)
    room = SIDE - sheet.y - (3.2 * small_pitch + 6 if paragraph else 0)
    fields = fields[: max(2, int(room // pitch))]
    aligned = rng.random() < 0.4
    widest = max(Face(sheet.body, size).width(f"{key}:") for key, _ in fields)
    values = sheet.left + widest + rng.randint(8, 40)
    keys = FACES[sheet.family + 1] if rng.random() < 0.3 else sheet.body
    first = paragraph and rng.random() < 0.25
    face = Face(sheet.body, small)
    return _Layout(size, pitch, face, small_pitch, paragraph, aligned, values, keys, first), fields


def _write_paragraph(sheet: _Sheet, layout: _Layout, words: list[str]) -> None:
    ink = sheet.ink()
    words = [words[0].capitalize(), *words[1:-1], f"{words[-1]}."]
    line = ""
    for word in words:
        longer = f"{line} {word}".strip()
        if layout.small.width(longer) > SIDE - 2 * sheet.left:
            sheet.lines.append(line)
            line = word
        else:
            line = longer
    sheet.lines.append(line)
    room = max(1, int((SIDE - sheet.y - 4) // layout.small_pitch))
    del sheet.lines[min(room, 4) if layout.paragraph_first else room :]
    for line in sheet.lines:
        at = (sheet.left, sheet.y + layout.small.size)
        sheet.canvas.text(at, line, layout.small, ink, sheet.rank)
        sheet.y += layout.small_pitch
        sheet.rank += 1


def _write_fields(sheet: _Sheet, layout: _Layout, fields: list[Field]) -> list[Field]:
    """Write the fields that have room; returns these."""
    size, written = layout.size, []
    keys, values = Face(layout.keys, size), Face(sheet.body, size)
    for key, value in fields:
        if sheet.y + size > SIDE - 3:
            break
        sheet.rank += 1
        plain = gray(235, "white") if sheet.dark else gray(20)
        ink = sheet.ink() if sheet.rng.random() < 0.3 else plain
        base = sheet.y + size
        end = sheet.canvas.text((sheet.left, base), f"{key}:", keys, ink, sheet.rank)
        x = max(layout.values, end + 5) if layout.aligned else end + size * 0.4
        while values.width(value) > SIDE - x - 3 and x > end + size * 0.4:
            x -= 4
        sheet.canvas.text((max(x, end + size * 0.35), base), value, values, ink, sheet.rank)
        written.append((key, value))
        sheet.y += layout.pitch
    return written


# --- questions


def _ask_fields(quiz: Quiz, title: str, fields: list[Field]) -> None:
    rng = quiz.rng
    quiz.ask(
        "title",
        title,
        "What is the title?",
        "What does the heading say?",
        "Read the title of the page.",
        "What is written at the top?",
    )
    for key, value in fields:
        _ask_value(quiz, key, value)
    key, value = rng.choice(fields)
    if [other for _, other in fields].count(value) == 1:
        quiz.ask(
            "key_of_value",
            key,
            f"Which field has the value {value}?",
            f"What is {value}?",
            f"To which field does {value} belong?",
        )
    place = rng.randrange(len(fields))
    quiz.ask(
        "nth_field",
        f"{fields[place][0]}: {fields[place][1]}",
        f"What is the {ORDINALS[place]} field?",
        f"Read field number {place + 1}.",
        f"What is in the {ORDINALS[place]} field line?",
    )
    quiz.ask(
        "count_fields",
        NUMBERS[len(fields)],
        "How many fields are listed?",
        "Count the fields.",
        "How many labeled lines are there?",
    )
    asked = rng.choice(fields)[0] if quiz.chance(0.5) else rng.choice(_ASKED)
    quiz.ask(
        "has_field",
        "yes" if any(asked == key for key, _ in fields) else "no",
        f"Is there a field called {asked}?",
        f"Does the page list a {asked.lower()}?",
        f"Is the {asked.lower()} given?",
    )
    for (key, _), (below, _) in pairwise(fields):
        if quiz.chance(0.3):
            wordings = f"Which field comes after {key}?", f"What is listed right below {key}?"
            quiz.ask("next_field", below, *wordings)


def _ask_value(quiz: Quiz, key: str, value: str) -> None:
    if key == "Date":
        quiz.ask("date", value, "What is the date?", "Which date is on the page?", "When is it dated?")
    elif key == "Total":
        quiz.ask("total", value, "What is the total?", "How much is the total?", "What is the total amount?")
    else:
        name = key.lower()
        quiz.ask(
            "value_of_key",
            value,
            f"What is the {name}?",
            f"What does the page give as {name}?",
            f"Read the {name}.",
            f"Which value is given for {name}?",
        )


def _ask_paragraph(quiz: Quiz, text: str) -> None:
    rng, written = quiz.rng, text.split()
    words = [word.strip(".").lower() for word in written]
    quiz.ask(
        "first_word",
        words[0],
        "What is the first word of the paragraph?",
        "With which word does the paragraph start?",
    )
    quiz.ask(
        "last_word",
        words[-1],
        "What is the last word of the paragraph?",
        "With which word does the paragraph end?",
    )
    for _ in range(2 if len(words) > 1 else 0):
        place = rng.randrange(len(words) - 1)
        if words.count(words[place]) == 1:
            quiz.ask(
                "word_after",
                words[place + 1],
                f"Which word comes after {words[place]}?",
                f"What word follows {words[place]} in the paragraph?",
            )
    asked = rng.choice(words) if quiz.chance(0.5) else rng.choice(WORDS)
    quiz.ask(
        "mentions",
        "yes" if asked in words else "no",
        f"Does the paragraph mention {asked}?",
        f"Is the word {asked} in the paragraph?",
    )
    if len(written) <= _LONGEST:
        quiz.ask(
            "paragraph",
            text,
            "Read the paragraph.",
            "What does the paragraph say?",
            "Transcribe the paragraph.",
        )
