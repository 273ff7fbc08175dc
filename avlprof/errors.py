"""The one exception that a user's input can raise."""

from __future__ import annotations

import reprlib
from typing import Final

_NO_MEMORY: Final = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


class UserError(Exception):
    """A problem the user can mend; its message is one sentence naming field, value and remedy.

    The command line prints it without a traceback and exits with code 2.
    """


def cut(text: str, most: int = 300) -> str:
    """A text on one line, with `...` in place of what is too much for a message."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most and len(text) <= 4 * most else f"{line[: most - 3]}..."


def shortened(value: object, most: int = 60) -> str:
    """A value as a message shows it: as Python writes it, cut, without ever writing all of a large one."""
    writer = reprlib.Repr()
    writer.maxlevel, writer.maxstring, writer.maxlong, writer.maxother = 2, most, most, most
    return cut(writer.repr(value), most)


def counted(count: int, noun: str) -> str:
    """`1 sample`, `2 samples`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory left, on whichever device."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)
