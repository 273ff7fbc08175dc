"""Starts that a study takes over from another one, noted in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from avlprof.errors import UserError
from avlprof.files import write_text
from avlprof.tuning.candidate import Candidate

STARTS = "starts.json"


def noted_starts(folder: Path, given: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The starts that the study in a folder was begun with; a new study notes those `given`.

    A study that is resumed goes on with its own, whatever its neighbour has found since.

    Raises:
        UserError: the note cannot be read.
    """
    path = folder / STARTS
    if not path.exists():
        if given:
            write_text(path, json.dumps([asdict(start) for start in given], indent=1) + "\n")
        return tuple(given)
    try:
        return tuple(Candidate(**start) for start in json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete that study") from None
