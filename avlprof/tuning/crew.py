"""Who works on a study: this process alone, or with others that it starts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from avlprof.errors import UserError
from avlprof.tuning.objective import Objective, Points
from avlprof.tuning.places import Place
from avlprof.tuning.settings import Settings
from avlprof.tuning.storage import find_place
from avlprof.tuning.trials import note_asked, run_trials
from avlprof.tuning.workers import Workers


@dataclass(frozen=True)
class Crew:
    """How many processes work on a study, this one included, and how the others find model and task.

    `storage` is the URL of a PostgreSQL database for the trials, by default a journal in the
    study's folder. The other fields are what this process loaded its model and task by.

    Raises:
        UserError: less than one worker.
    """

    workers: int = 1
    storage: str | None = None
    model: str = "tiny"
    task: str = "shapes"
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"workers must be 1 or more, got {self.workers}")

    def place(self, folder: Path) -> Place:
        """Where the trials of a study are."""
        return find_place(folder, self.storage)

    def command(self, folder: Path) -> list[str]:
        """What starts a further worker of a study on this machine."""
        words = [sys.executable, "-m", "avlprof", "studies", "join", str(folder)]
        words += ["--model", self.model, "--task", self.task, "--device", self.device, "--dtype", self.dtype]
        words += ["--revision", self.revision] if self.revision else []
        return words + (["--trust-remote-code"] if self.trust_remote_code else [])

    def run(
        self,
        place: Place,
        settings: Settings,
        space: Points,
        objective: Objective,
        *,
        progress: Callable[[int, int], None] | None = None,
        on_trial: Callable[[optuna.Study, FrozenTrial], None] | None = None,
    ) -> optuna.Study:
        """Run a study until all its trials are done; see `run_trials`."""

        def run(watch: Callable[[optuna.Study], None] | None) -> optuna.Study:
            return run_trials(
                place.folder,
                settings,
                space,
                objective,
                progress=progress,
                on_trial=on_trial,
                place=place,
                shared=self.workers > 1,
                watch=watch,
            )

        note_asked(place, settings)
        if self.workers == 1:
            return run(None)
        with Workers(place, self.command(place.folder), self.workers - 1) as others:
            return run(others.watch)
