"""The embedded model: its builder, its training, and the checkpoint that ships in `weights/`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

WEIGHTS: Final = Path(__file__).parent / "weights"


FOREIGN: Final = (
    "the embedded model knows only pictures such as its own task 'shapes' draws; "
    "what it says of others, and where it looks in them, means nothing"
)
