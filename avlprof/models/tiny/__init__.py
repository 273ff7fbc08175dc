"""The embedded models: where the checkpoints of `tiny` and `tiny-mrope` lie, and what they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Final

WEIGHTS: Final = Path(__file__).parent / "weights"
MROPE_WEIGHTS: Final = Path(__file__).parent / "weights-mrope"

FOLDERS: Final = {"tiny": WEIGHTS, "tiny-mrope": MROPE_WEIGHTS}
"""Folder of each embedded model by its alias."""

FOREIGN: Final = (
    "the embedded model knows only pictures such as its own task 'shapes' draws; "
    "what it says of others, and where it looks in them, means nothing"
)
