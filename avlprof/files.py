"""Atomic file writing: a reader sees the old file or the whole new one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from avlprof.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write to; it takes the name of `path` on success.

    On failure the temporary file is removed and an existing `path` stays as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder {path.parent} cannot be made: {error.strerror or error}") from None
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    except UnicodeEncodeError as error:
        raise UserError(f"{path} cannot be written: {_half(error)}") from None
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _half(error: UnicodeEncodeError) -> str:
    """What an error says about a lone surrogate, such as JSON's `\\ud83d` without its other half."""
    return f"half of a character (\\u{ord(error.object[error.start]):04x} at {error.start})"
