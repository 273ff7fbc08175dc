"""Texts of users: how a message quotes them, whether a file can store them, and JSON in them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from avlprof.errors import UserError

LONGEST = 80
"""Characters of a value that a message quotes; paths may have `LONGEST_PATH`."""

LONGEST_PATH = 240


def shorten(text: object, most: int = LONGEST) -> str:
    """A text on one line, its middle left out where it is longer than `most` characters."""
    line = " ".join(str(text).split())
    if len(line) <= most:
        return line
    head = most * 3 // 4
    return f"{line[:head]}...{line[-(most - head) :]} ({len(line):,} characters)"


def quoted(value: object) -> str:
    """A value as a message quotes it: JSON where it can be, cut to `LONGEST` characters.

    Bytes and pictures are named by their size alone.
    """
    if isinstance(value, bytes | bytearray):
        return f"{len(value):,} bytes"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return printable(text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}...")


def printable(text: str) -> str:
    """The text with lone surrogates written as `\\udXXX`, so that every terminal and file takes it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def listed(names: Iterable[object], most: int = 12) -> str:
    """Names with commas between, the first `most` of them."""
    texts = [printable(shorten(name, 40)) for name in names]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more if texts else "none"


def storable(value: object) -> bool:
    """Whether all texts within a value can be written as UTF-8; lone surrogates cannot."""
    try:  # in C, and enough for nearly all
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError):
        pass
    else:
        return True
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                return False
        elif isinstance(item, dict):
            rest += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            rest += item
    return True


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; `where` begins the message of `UserError`, also for doubled keys."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not a JSON object ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{where}: lists within lists, too deep to be read; write it flat") from None
    except ValueError as error:  # a number of thousands of digits, a key that is there twice
        raise UserError(f"{where}: not a JSON object that can be read ({shorten(error)})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {quoted(twice)} is there twice")
    return values
