"""What the command line says of an exception: a sentence for those whose cause is known."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from avlprof.errors import UserError, cut, is_out_of_memory, shortened

_SAVING: Final = (
    "--batch-size",
    "--prompt-bytes",
    "--samples",
    "--max-new-tokens",
    "--quantize",
    "--device-map",
)
"""Options that need less memory with smaller values, those that cost least first."""
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_LONG_WORD = re.compile(r"\S{256,}")


def sentence(error: Exception, flags: Iterable[str], words: Sequence[str] = ()) -> str | None:
    """One sentence for what is the user's to mend; None for what nobody expected.

    Args:
        flags: long options of the command at work, by which its arguments are called.
        words: the command line.
    """
    flags = list(flags)
    if isinstance(error, UserError):
        return _LONG_WORD.sub(lambda match: cut(match[0], 100), by_flags(str(error), flags))
    if hasattr(error, "format_message"):  # wrong usage, by typer
        context = getattr(error, "ctx", None)
        more = f" (see '{context.command_path} --help')" if context is not None else ""
        said = str(error.format_message()).replace("Value error, ", "").rstrip(".")
        return f"{cut(said)}{_wrong_value(error, said, words)}{more}"
    if is_out_of_memory(error):
        return out_of_memory(error, flags)
    if isinstance(error, OSError) and error.strerror:
        return (
            f"{shortened(os.fspath(error.filename), 200)}: {error.strerror}"
            if error.filename
            else error.strerror
        )
    return None


def _wrong_value(error: Any, said: str, words: Sequence[str]) -> str:
    """The value that an option could not take, where the message lacks it; of a percentage the share."""
    options = getattr(getattr(error, "param", None), "opts", ())
    pairs = [
        *itertools.pairwise(words),
        *(tuple(word.split("=", 1)) for word in words if "=" in word),
    ]
    value = next((after for word, after in reversed(pairs) if word in options), None)
    if value is None:
        return ""
    share = _PERCENT.fullmatch(value.strip())
    meant = f"; did you mean {float(share[1]) / 100:g}?" if share is not None else ""
    return meant if value in said else f", got {shortened(value)}{meant}"


def out_of_memory(error: BaseException, flags: Iterable[str]) -> str:
    """What was wanted, as far as the error says, and which options of the command need less."""
    there = set(flags)
    saving = [flag for flag in _SAVING if flag in there]
    wanted = re.search(r"allocate ([\d.]+ \w?i?B|\d+ bytes)", str(error))
    what = f" for {wanted[1]} more" if wanted else ""
    less = f"; use less: {', '.join(saving)}" if saving else ""
    return f"not enough memory{what}{less}"


def by_flags(message: str, flags: Iterable[str]) -> str:
    """The message with arguments of Python called by the options of the command.

    Names of several words wherever they stand; single words only where the sentence is about them.
    """
    for flag in flags:
        name = flag.removeprefix("--").replace("-", "_")
        if "_" in name:
            message = re.sub(rf"(?<![\w.'/=-]){name}(?![\w'/.]|\(|:)", flag, message)
        elif message.startswith(f"{name} must "):
            message = f"{flag}{message.removeprefix(name)}"
    return message


def flags_of(command: Any) -> Iterator[str]:
    """The long options of a command, or of all commands of a group."""
    for parameter in getattr(command, "params", ()):
        yield from (option for option in parameter.opts if option.startswith("--"))
    for inner in (getattr(command, "commands", None) or {}).values():
        yield from flags_of(inner)
