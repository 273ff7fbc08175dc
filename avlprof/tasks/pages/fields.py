"""What a document says: its heading and its fields."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from avlprof.tasks.pages.quiz import clock, code, date, money, pick
from avlprof.tasks.pages.words import (
    CITIES,
    COMPANIES,
    COMPANY_ENDINGS,
    FIRST_NAMES,
    LAST_NAMES,
    PRODUCTS,
    STATES,
    TITLES,
    WORDS,
)

Field = tuple[str, str]
"""The name of a field, and its value."""


def _person(rng: Random) -> str:
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


_FIELDS: dict[str, Callable[[Random], str]] = {
    "Customer": _person,
    "Name": _person,
    "Agent": _person,
    "Contact": _person,
    "City": lambda rng: rng.choice(CITIES),
    "Country branch": lambda rng: rng.choice(CITIES),
    "Phone": lambda rng: f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}",
    "Invoice no": code,
    "Order no": code,
    "Ref": code,
    "Account": code,
    "Code": code,
    "Item": lambda rng: rng.choice(PRODUCTS),
    "Qty": lambda rng: str(rng.randint(1, 99)),
    "Price": money,
    "Tax": money,
    "Discount": lambda rng: f"{rng.randint(1, 60)}%",
    "Shipping": money,
    "Weight": lambda rng: f"{rng.randint(1, 99)} kg",
    "Status": lambda rng: rng.choice(STATES),
    "Room": lambda rng: str(rng.randint(1, 999)),
    "Seat": lambda rng: f"{rng.randint(1, 40)}{rng.choice('ABCDEF')}",
    "Gate": lambda rng: f"{rng.choice('ABCDEF')}{rng.randint(1, 40)}",
    "Company": lambda rng: f"{rng.choice(COMPANIES)} {rng.choice(COMPANY_ENDINGS)}",
    "Due date": date,
    "Time": clock,
    "Member level": lambda rng: rng.choice(["gold", "silver", "copper", "iron", "steel"]),
    "Street": lambda rng: f"{rng.randint(1, 99)} {rng.choice(WORDS).capitalize()} Road",
}


def draw_fields(rng: Random) -> list[Field]:
    """The fields of a document, in their order: kinds and values."""
    count = rng.randint(3, 7)
    fields = [(key, value(rng)) for key, value in rng.sample(list(_FIELDS.items()), count)]
    if rng.random() < 0.65:
        fields.insert(rng.randrange(len(fields) + 1), ("Date", date(rng)))
    if rng.random() < 0.6:
        fields.append(("Total", money(rng)))
    return fields


def draw_title(rng: Random) -> str:
    """The heading of a document."""
    title = pick(
        rng,
        rng.choice(TITLES),
        f"{rng.choice(TITLES)} {code(rng)}",
        f"{rng.choice(COMPANIES)} {rng.choice(COMPANY_ENDINGS)}",
        f"{rng.choice(WORDS).capitalize()} {rng.choice(TITLES)}",
        f"{rng.choice(WORDS).capitalize()} {rng.choice(WORDS).capitalize()}",
    )
    return title.upper() if rng.random() < 0.25 else title
