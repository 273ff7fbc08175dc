"""Questions about a page, and the values that pages are filled with."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from avlprof.tasks.pages.words import MONTHS, SHORT_MONTHS


class Question(NamedTuple):
    """A question of a type, with its one right answer."""

    group: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Quiz:
    """Collects the questions about a page, each in one of several wordings."""

    rng: Random
    questions: list[Question] = field(default_factory=list)

    def ask(self, group: str, answer: str, *wordings: str) -> None:
        """Add a question in one of its wordings."""
        self.questions.append(Question(group, pick(self.rng, *wordings), answer))

    def chance(self, share: float) -> bool:
        """True in `share` of the cases."""
        return self.rng.random() < share


def pick(rng: Random, *options: str) -> str:
    """One of some texts, all of which are made beforehand."""
    return options[rng.randrange(len(options))]


def code(rng: Random) -> str:
    """Something like an order number: `AB-1234`, `12345`, `ABC123`, `A12-345`."""
    kind = rng.randrange(4)

    def letters(count: int) -> str:
        return "".join(rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(count))

    def digits(count: int) -> str:
        return "".join(rng.choice("0123456789") for _ in range(count))

    options = (
        f"{letters(2)}-{digits(4)}",
        digits(5),
        letters(3) + digits(3),
        f"{letters(1)}{digits(2)}-{digits(3)}",
    )
    return options[kind]


def date(rng: Random) -> str:
    """A day in one of four ways of writing it."""
    day, month, year = rng.randint(1, 28), rng.randrange(12), rng.randint(1990, 2029)
    return pick(
        rng,
        f"{day} {MONTHS[month]} {year}",
        f"{SHORT_MONTHS[month]} {day}, {year}",
        f"{year}-{month + 1:02d}-{day:02d}",
        f"{day:02d}/{month + 1:02d}/{year}",
    )


def money(rng: Random) -> str:
    """A sum in dollars, with or without cents and commas."""
    value = rng.choice([rng.randint(5, 99), rng.randint(100, 999), rng.randint(1000, 9999)])
    cents = pick(rng, "", f".{rng.randint(0, 99):02d}", ".00")
    return f"${value:,}{cents}" if rng.random() < 0.5 else f"${value}{cents}"


def clock(rng: Random) -> str:
    """A time of day, in quarters of an hour."""
    return f"{rng.randint(0, 23):02d}:{rng.choice(['00', '15', '30', '45'])}"
