"""One study a budget, each started from its neighbour's best, into one front of quality and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from avlprof.analysis import Profile
from avlprof.errors import UserError
from avlprof.files import replacing
from avlprof.models import LoadedModel
from avlprof.tasks import Task
from avlprof.tuning.candidate import Candidate
from avlprof.tuning.prepared import prepare
from avlprof.tuning.settings import Settings, check_budget
from avlprof.tuning.tune import Search, Tuned, prove_winner, search
from avlprof.tuning.workers import Workers
from avlprof.watch import SILENT, Watch


@dataclass(frozen=True)
class Sweep:
    """Studies by budget, smallest first, and what their proofs say together."""

    folder: Path
    studies: tuple[Tuned, ...]

    def front(self) -> pd.DataFrame:
        """One row a budget and policy; the columns of `Evaluation.summary`, and `budget`.

        The dense model is the same in all proofs and stands once, at budget 1.
        """
        parts = []
        for number, tuned in enumerate(self.studies):
            rows = tuned.proof.summary()
            budget = tuned.policy.provenance.budget if tuned.policy.provenance else None
            rows.insert(0, "budget", budget)
            rows.loc[rows["policy"] == "dense", "budget"] = 1.0
            parts.append(rows if number == 0 else rows[rows["policy"] != "dense"])
        return pd.concat(parts, ignore_index=True)

    def write(self) -> Path:
        """The front as CSV in the folder of the sweep."""
        path = self.folder / "front.csv"
        with replacing(path) as partial:
            self.front().to_csv(partial, index=False)
        return path


def sweep(
    loaded: LoadedModel,
    task: Task,
    profile: Profile,
    folder: Path,
    budgets: Sequence[float],
    settings: Settings | None = None,
    *,
    workers: Workers | None = None,
    watch: Watch = SILENT,
) -> Sweep:
    """Tune and prove at several memory budgets; the same call resumes.

    Studies run from the smallest budget up, in `<folder>/b<budget>`, and each takes the winner of
    the one before as a start. Dense answers, prompts and the sensitivity probe are shared. A read
    budget in `settings` holds for all of them.

    Raises:
        UserError: as `tune`, or no budget or one twice is given.
    """
    settings, rising = settings or Settings(), sorted(budgets)
    if not rising or len(set(rising)) < len(rising):
        raise UserError(f"budgets must be different and at least one, got {list(budgets)}")
    for budget in rising:
        check_budget("budget", budget)
    prepared = prepare(loaded, task, profile, settings, watch)
    for budget in rising:
        settings.space.within(prepared.budget(budget, settings.read_budget), prepared.layers)
    folder.mkdir(parents=True, exist_ok=True)
    studies: list[Tuned] = []
    before: Search | None = None
    for budget in rising:
        watch.budget(budget)
        before = search(
            before.prepared if before else prepared,
            folder / f"b{budget:g}",
            budget,
            settings,
            starts=neighbour(before),
            probe=folder / "probe.json",
            workers=workers,
            watch=watch,
        )
        studies.append(prove_winner(before, watch))
    swept = Sweep(folder, tuple(studies))
    swept.write()
    return swept


def neighbour(before: Search | None) -> list[Candidate]:
    """The start that a study takes over from the one before."""
    return [before.candidate] if before else []
