"""Charts: labelled bars, standing or lying, with their values."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from avlprof.tasks.pages.canvas import FACES, SIDE, Canvas, Face, blurred, gray, pale
from avlprof.tasks.pages.quiz import Quiz, pick
from avlprof.tasks.pages.words import (
    CITIES,
    COLORS,
    COMPANIES,
    FIRST_NAMES,
    FRUITS,
    NUMBERS,
    ORDINALS,
    PRODUCTS,
    SHORT_MONTHS,
    listed,
)

_TOPICS = (
    ("Sales", "month"),
    ("Visitors", "city"),
    ("Rainfall", "month"),
    ("Votes", "name"),
    ("Stock", "product"),
    ("Points", "name"),
    ("Profit", "company"),
    ("Goals", "name"),
    ("Books", "name"),
    ("Cars", "city"),
    ("Trees", "city"),
    ("Hours", "name"),
    ("Cost", "product"),
    ("Units", "fruit"),
)
_LABELS = {
    "city": CITIES,
    "name": FIRST_NAMES,
    "product": tuple(product.capitalize() for product in PRODUCTS),
    "company": COMPANIES,
    "fruit": FRUITS,
}
_MIDDLE = 0.36  # of a letter's size: from the baseline to the middle of a line
_INK, _TITLE_INK = gray(25), gray(20)


@dataclass(frozen=True)
class _Bars:
    """What a chart shows."""

    title: str
    labels: list[str]
    values: list[int]
    colors: list[str]
    top: int

    def __len__(self) -> int:
        return len(self.labels)


def chart(rng: Random) -> tuple[Canvas, Quiz]:
    """Draw a bar chart and ask about it."""
    canvas = Canvas(pale(rng))
    topic, of = rng.choice(_TOPICS)
    count = rng.randint(3, 7)
    lying = count > 5 or rng.random() < 0.45
    labels = _labels(rng, of, count, lying)
    top = rng.choice([20, 50, 100, 100, 500, 1000])
    values = rng.sample(range(max(1, top // 12), top + 1), count)
    title = pick(
        rng,
        topic,
        f"{topic} by {of}",
        f"{topic} {rng.randint(1990, 2029)}",
        f"{rng.choice(CITIES)} {topic.lower()}",
    )
    name, title_name = rng.choice(FACES[:4]), FACES[rng.choice([1, 3, 0])]
    title_size, face = rng.randint(15, 20), Face(name, rng.randint(12, 14))
    bars = _Bars(title, labels, values, _colors(rng, count), top)
    title_face = Face(title_name, title_size).fitted(title, SIDE - 20, 0)
    x = 10 if rng.random() < 0.4 else (SIDE - title_face.width(title)) / 2
    canvas.text((x, 8 + title_face.size), title, title_face, _TITLE_INK, 1)
    y = title_face.size + rng.randint(20, 30)
    (_lying if lying else _standing)(rng, canvas, bars, face, y)
    quiz = Quiz(rng)
    _ask(quiz, bars)
    return canvas, quiz


def _labels(rng: Random, of: str, count: int, lying: bool) -> list[str]:
    if of == "month":
        first = rng.randrange(12 - count + 1)
        return list(SHORT_MONTHS[first : first + count])
    longest = 8 if lying else 7 if count < 5 else 6
    return rng.sample([label for label in _LABELS[of] if len(label) <= longest], count)


def _colors(rng: Random, count: int) -> list[str]:
    """All bars in one colour, each in another, or any."""
    if rng.random() < 0.5:
        return [rng.choice(COLORS)] * count
    if rng.random() < 0.5:
        return rng.sample(COLORS, count)
    return [rng.choice(COLORS) for _ in range(count)]


def _lying(rng: Random, canvas: Canvas, bars: _Bars, face: Face, y: float) -> None:
    y += rng.randint(0, max(0, 150 - 20 * len(bars)))
    left = 10 + max(face.width(label) for label in bars.labels) + 6
    room = face.width(str(bars.top)) + 8
    pitch = min(44, (SIDE - y - 8) / len(bars))
    thick = min(pitch - 4, rng.uniform(0.45, 0.8) * pitch)
    rows = zip(bars.labels, bars.values, bars.colors, strict=True)
    for index, (label, value, color) in enumerate(rows):
        middle, rank = y + pitch * (index + 0.5), 2 + index
        long = max(3, value / max(bars.values) * (SIDE - left - room - 6))
        edges = (left, middle - thick / 2, left + long, middle + thick / 2)
        canvas.box(edges, "bar", blurred(rng, color), rank)
        base = middle + _MIDDLE * face.size
        canvas.text((left - 5 - face.width(label), base), label, face, _INK, rank)
        canvas.text((left + long + 4, base), str(value), face, _INK, rank)
    canvas.draw.line((left, y, left, y + pitch * len(bars)), fill=_INK.rgb)


def _standing(rng: Random, canvas: Canvas, bars: _Bars, face: Face, y: float) -> None:
    ground = SIDE - face.size - rng.randint(8, 16)
    left = rng.randint(6, 16)
    pitch = (SIDE - 2 * left) / len(bars)
    thick = rng.uniform(0.4, 0.75) * pitch
    share = rng.uniform(0.75, 1.0)
    while max(face.width(label) for label in bars.labels) > pitch - 3 and face.size > 11:
        face = Face(face.name, face.size - 1)
    room = ground - y - face.size - 6
    rows = zip(bars.labels, bars.values, bars.colors, strict=True)
    for index, (label, value, color) in enumerate(rows):
        middle, rank = left + pitch * (index + 0.5), 2 + index
        high = max(3, value / max(bars.values) * room * share)
        edges = (middle - thick / 2, ground - high, middle + thick / 2, ground)
        canvas.box(edges, "bar", blurred(rng, color), rank)
        for text, base in ((label, ground + face.size + 3), (str(value), ground - high - 4)):
            canvas.text((middle - face.width(text) / 2, base), text, face, _INK, rank)
    canvas.draw.line((left, ground, SIDE - left, ground), fill=_INK.rgb)


# --- questions


def _ask(quiz: Quiz, bars: _Bars) -> None:
    labels, values, rng = bars.labels, bars.values, quiz.rng
    quiz.ask(
        "chart_title",
        bars.title,
        "What is the title of the chart?",
        "What does the chart title say?",
        "Read the chart title.",
    )
    quiz.ask(
        "highest",
        labels[values.index(max(values))],
        "Which bar is the highest?",
        "Which one has the largest value?",
        "What is the label of the biggest bar?",
    )
    quiz.ask(
        "lowest",
        labels[values.index(min(values))],
        "Which bar is the lowest?",
        "Which one has the smallest value?",
        "What is the label of the smallest bar?",
    )
    quiz.ask(
        "count_bars",
        NUMBERS[len(bars)],
        "How many bars are there?",
        "Count the bars.",
        "What is the number of bars?",
    )
    quiz.ask(
        "max_value",
        str(max(values)),
        "What is the highest value?",
        "What is the largest value in the chart?",
    )
    for index in range(len(bars)):
        _ask_bar(quiz, bars, index)
    for _ in range(2):
        one, two = rng.sample(range(len(bars)), 2)
        quiz.ask(
            "compare",
            labels[one if values[one] > values[two] else two],
            f"Which is higher, {labels[one]} or {labels[two]}?",
            f"Which has the larger value: {labels[one]} or {labels[two]}?",
        )
    place = rng.randrange(len(bars))
    quiz.ask(
        "nth_bar",
        labels[place],
        f"What is the label of bar number {place + 1}?",
        f"Read the label of the {ORDINALS[place]} bar.",
    )
    if quiz.chance(0.5):
        place = rng.randrange(len(bars) - 1)
        quiz.ask(
            "next_bar",
            labels[place + 1],
            f"Which bar comes after {labels[place]}?",
            f"What is the next bar after {labels[place]}?",
        )
    quiz.ask(
        "list_labels",
        ", ".join(labels),
        "List the labels of the bars.",
        "Which labels are on the chart?",
        "Name all the bars in order.",
    )
    pairs = [f"{label} with {value}" for label, value in zip(labels, values, strict=True)]
    quiz.ask(
        "read_chart",
        f"The chart {bars.title} shows {listed(pairs)}.",
        "Read the whole chart.",
        "List every bar with its value.",
        "Describe the chart with all its values.",
    )


def _ask_bar(quiz: Quiz, bars: _Bars, index: int) -> None:
    label, value, color = bars.labels[index], bars.values[index], bars.colors[index]
    quiz.ask(
        "bar_value",
        str(value),
        f"What is the value of {label}?",
        f"How much is {label}?",
        f"Which value does {label} have?",
        f"Read the value for {label}.",
    )
    if quiz.chance(0.5):
        wordings = f"Which bar has the value {value}?", f"Which label goes with {value}?"
        quiz.ask("bar_of_value", label, *wordings)
    if quiz.chance(0.5):
        wordings = f"What color is the bar of {label}?", f"What is the color of the {label} bar?"
        quiz.ask("bar_color", color, *wordings)
    if bars.colors.count(color) == 1:
        wordings = f"Which label has the {color} bar?", f"What does the {color} bar stand for?"
        quiz.ask("bar_of_color", label, *wordings)
