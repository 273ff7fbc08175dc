"""The model `small`: where its folder lies once it is fetched, and what it is for. No torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

from avlprof.errors import UserError

NAME: Final = "small"
MARK: Final = "avlprof.json"
"""File of a fetched folder that says what it was made of; it is written last."""

FOREIGN: Final = (
    "the model 'small' knows only pictures such as its own task draws (--task pages); "
    "what it says of others, and where it looks in them, means nothing"
)


def cache_folder() -> Path:
    """Where fetched models lie: `AVLPROF_CACHE`, else `avlprof` in the user's cache folder."""
    own = os.environ.get("AVLPROF_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "avlprof"


def small_folder() -> Path:
    """Where `avlprof models fetch small` writes to unless it is told otherwise."""
    return cache_folder() / NAME


def mark_of(folder: Path) -> dict[str, Any] | None:
    """What a fetched folder was made of; None for any other folder."""
    try:
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("model") == NAME else None


def fetched_folder() -> Path:
    """The folder of the fetched model; `UserError` when it is not there."""
    folder = small_folder()
    if mark_of(folder) is None:
        raise UserError(
            f"model '{NAME}' is not fetched yet: no model in {folder}; run 'avlprof models fetch {NAME}'"
        )
    return folder
