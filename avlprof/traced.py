"""A traced run, as notebooks and commands use it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from PIL import Image

from avlprof.analysis import Profile
from avlprof.errors import UserError
from avlprof.models import LoadedModel
from avlprof.pictures import find_pictures
from avlprof.runs import RunDirectory, RunMeta
from avlprof.runs.directory import Scores
from avlprof.tasks import Task, load_task
from avlprof.tracing.trace import Progress

RUNS = Path("runs")


@dataclass(frozen=True)
class Run:
    """A traced run: its tables, its scores, its pictures and its profile."""

    directory: RunDirectory

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """The run in a directory; `UserError` when there is none."""
        run = cls(RunDirectory(path))
        _ = run.meta
        return run

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.directory.path

    @property
    def meta(self) -> RunMeta:
        """With what it was traced."""
        return self.directory.meta

    def profile(self, progress: Progress | None = None) -> Profile:
        """What the model attends to, per layer; computed once and saved in the run directory."""
        return Profile.of(self.directory, progress)

    def samples(self) -> pd.DataFrame:
        """One row a sample; see `avlprof.runs.RunDirectory`."""
        return self.directory.samples()

    def stats(self) -> pd.DataFrame:
        """One row per sample, layer, head, phase and kind of query row."""
        return self.directory.stats()

    def scores(self, sample: str, names: Collection[str] = ()) -> Scores:
        """Attention that single tokens of a sample received, by kind of row; of `names` alone, if given."""
        return self.directory.scores(sample, names)

    def pictures(self, sample: str, task: Task | str | None = None) -> list[Image.Image]:
        """The pictures of a traced sample.

        They are not stored in a run, but found again: by the paths that the run noted, else in
        its task by the name that it noted, else in `task`. `UserError` when that fails.
        """
        return find_pictures(self.directory, sample, load_task(task) if isinstance(task, str) else task)

    def check_model(self, loaded: LoadedModel) -> None:
        """`UserError` when the run was traced on another model, or another state of it."""
        if not self.is_of(loaded):
            theirs = f"{loaded.source} {loaded.revision or ''}".strip()
            ours = f"{self.meta.model} {self.meta.model_hash}".strip()
            raise UserError(
                f"run {self.path} was traced on {ours}, the model here is {theirs}; trace this one"
            )

    def is_of(self, loaded: LoadedModel) -> bool:
        """Whether the run was traced on this model in this state."""
        return (self.meta.model, self.meta.model_hash) == (loaded.source, loaded.revision or "")


def latest_run(
    root: Path | str = RUNS, *, loaded: LoadedModel | None = None, task: str | None = None
) -> Run | None:
    """The run under `root` that was written to last and has samples; of this model and task, if given.

    For a model only dense runs count: what it attends to under a policy is not what it needs.
    """
    found = []
    for path in Path(root).glob("*/meta.json"):
        parts = [part.stat().st_mtime for part in path.parent.glob("samples-*.parquet")]
        if parts:
            found.append((max(parts), path.parent))
    for _, folder in sorted(found, reverse=True):
        run = Run(RunDirectory(folder))
        try:
            dense = loaded is None or (run.is_of(loaded) and not run.meta.policy)
            fits = dense and task in (None, run.meta.task)
        except UserError:
            continue
        if fits:
            return run
    return None
