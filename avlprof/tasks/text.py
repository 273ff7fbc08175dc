"""Texts of users: how a message quotes them, and whether a file can store them."""

from __future__ import annotations

import json
from collections.abc import Iterable

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
