"""What a report is made from."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import pandas as pd
from PIL import Image

from avlprof.analysis import Profile
from avlprof.runs import RunMeta
from avlprof.runs.directory import Scores
from avlprof.tasks import Task


class TracedRun(Protocol):
    """A run with its profile and its pictures; `avlprof.Run` is one."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    @property
    def meta(self) -> RunMeta:
        """With what it was traced."""

    def profile(self) -> Profile:
        """What the model attends to, per layer."""

    def samples(self) -> pd.DataFrame:
        """One row a sample; see `avlprof.runs.RunDirectory`."""

    def scores(self, sample: str, names: Collection[str] = ()) -> Scores:
        """Attention that single tokens of a sample received, by kind of row; of `names` alone, if given."""

    def pictures(self, sample: str, task: Task | str | None = None) -> list[Image.Image]:
        """The pictures of a sample; `UserError` when they cannot be found."""
