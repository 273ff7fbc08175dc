"""Whose settings a run directory holds: known before anything is written, settled once."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import ValidationError

from avlprof.errors import UserError
from avlprof.runs.meta import RunMeta

META = "meta.json"


def read_meta(path: Path) -> RunMeta:
    """Settings of the run in a folder; `UserError` when they cannot be read."""
    try:
        return RunMeta.model_validate_json((path / META).read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        raise unreadable(path / META, error) from None


def check_free(path: Path, meta: RunMeta) -> None:
    """`UserError` where no run of these settings can be begun or resumed.

    Hidden files do not count: a process killed early leaves some.
    """
    if (path / META).exists():
        different = read_meta(path).differences(meta)
        if different:
            raise UserError(f"{path} holds another run ({'; '.join(different)}); choose another --out")
    elif path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, not a run directory; choose another --out")
    elif path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        # another process may have begun the same run between the two looks
        if (path / META).exists():
            return check_free(path, meta)
        raise UserError(f"{path} is not empty and not a run directory; choose another --out")


def settle_meta(path: Path, meta: RunMeta, writer: str = "") -> None:
    """Write the settings if no process has yet; the first one's stand, and the others must equal them.

    Args:
        writer: tells processes on several machines apart, which may have the same number.

    Raises:
        UserError: the folder holds other settings, or cannot be written.
    """
    file = path / META
    if not file.exists():
        partial = path / f".{META}.{writer}{os.getpid()}.partial"
        try:
            partial.write_text(meta.model_dump_json(indent=2) + "\n", encoding="utf-8")
            try:
                os.link(partial, file)
            except FileExistsError:
                pass
            except OSError:  # no hard links on this file system
                os.replace(partial, file)
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror or error}") from None
        finally:
            partial.unlink(missing_ok=True)
    check_free(path, meta)


def unreadable(path: Path, error: Exception) -> UserError:
    """The sentence about a file of a run that is broken."""
    return UserError(f"{path} cannot be read: {' '.join(str(error).split())}; trace into another --out")
