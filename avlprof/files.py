"""Atomic file writing: a reader sees the old file or the whole new one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from avlprof.errors import UserError, cut, shortened

LONGEST_NAME = 255
"""Bytes of a file's name on the file systems of today."""


def checked_path(path: Path | str, what: str = "path") -> Path:
    """The path; `UserError` when no file system takes it, which the system says by a bare number."""
    path = Path(path)
    if "\0" in str(path):
        raise UserError(f"{what} must not hold a zero byte, got {shortened(str(path))}")
    longest = max((os.fsencode(part) for part in path.parts), key=len, default=b"")
    if len(longest) > LONGEST_NAME or len(os.fsencode(path)) > 4095:
        raise UserError(
            f"{what} must have names of at most {LONGEST_NAME} bytes and 4095 in all, "
            f"got {shortened(str(path))}"
        )
    return path


def check_output(path: Path | str | None, folder: bool = False) -> None:
    """Refuse, before any work, an output that could not be written after it; nothing is made.

    Args:
        path: a file, or a folder that is to hold files; None is let through.
        folder: whether it is a folder.

    Raises:
        UserError: it is of the other kind, or the nearest folder that exists cannot be written.
    """
    if path is None:
        return
    path = checked_path(path, "output")
    try:
        if folder and path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; give a folder to write to")
        if not folder and path.is_dir():
            raise UserError(f"{path} is a folder; give the file to write")
        nearest = path if folder else path.parent
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir():
            raise UserError(f"{path} cannot be written: {nearest} is a file, not a folder")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(
            f"{path} cannot be written: folder {nearest} is not yours to write to; choose another"
        )
    if not folder and path.exists() and not path.is_file():
        raise UserError(f"{path} cannot be written: it is not a file")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write to; it takes the name of `path` on success.

    On failure the temporary file is removed and an existing `path` stays as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder {cut(str(path.parent))} cannot be made: {error.strerror or error}") from None
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{cut(str(path))} cannot be written: {error.strerror or error}") from None
    except UnicodeEncodeError as error:
        raise UserError(f"{cut(str(path))} cannot be written: {_half(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _half(error: UnicodeEncodeError) -> str:
    """What an error says about a lone surrogate, such as JSON's `\\ud83d` without its other half."""
    return f"half of a character (\\u{ord(error.object[error.start]):04x} at {error.start})"
