"""One study a budget, each started from its neighbour's best, into one front of quality and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from avlprof.analysis import Profile
from avlprof.errors import UserError
from avlprof.files import replacing
from avlprof.models import LoadedModel
from avlprof.tasks import Task
from avlprof.tuning.candidate import Candidate
from avlprof.tuning.prepared import Prepared, Progress
from avlprof.tuning.settings import Settings
from avlprof.tuning.space import Space
from avlprof.tuning.tune import (
    OnTrial,
    Search,
    Told,
    Tuned,
    prove_winner,
    search,
)
from avlprof.tuning.workers import Crew

AtBudget = Callable[[float], None]


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
            asked = tuned.policy.provenance.budget if tuned.policy.provenance else None
            rows.insert(0, "budget", asked)
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
    space: Space | None = None,
    progress: Progress | None = None,
    on_trial: OnTrial | None = None,
    on_budget: AtBudget | None = None,
    told: Told | None = None,
    crew: Crew | None = None,
) -> Sweep:
    """Tune and prove at several memory budgets; the same call resumes.

    Studies run from the smallest budget up, in `<folder>/b<budget>`, and each takes the winner of
    the one before as a start. Dense answers, prompts and the sensitivity probe are shared. A read
    budget in `settings` holds for all of them.

    Args:
        on_budget: called with each budget before its study.

    Raises:
        UserError: as `tune`, or no budget or one twice is given.
    """
    settings, space = settings or Settings(), space or Space()
    asked = sorted(budgets)
    if not asked or len(set(asked)) < len(asked):
        raise UserError(f"budgets must be different and at least one, got {list(budgets)}")
    planned = [replace(settings, budget=budget) for budget in asked]
    prepared = Prepared.make(loaded, task, profile, settings, space.scorers, progress)
    for each in planned:
        space.within(prepared.budget(each), prepared.layers)
    folder.mkdir(parents=True, exist_ok=True)
    done: list[Tuned] = []
    before: Search | None = None
    for each in planned:
        if on_budget:
            on_budget(each.budget)
        found = search(
            prepared,
            folder / f"b{each.budget:g}",
            each,
            space,
            warm=neighbour(before),
            probe=folder / "probe.json",
            progress=progress,
            on_trial=on_trial,
            told=told,
            crew=crew,
        )
        done.append(prove_winner(found, progress=progress, told=told))
        before = found
    swept = Sweep(folder, tuple(done))
    swept.write()
    return swept


def neighbour(before: Search | None) -> list[Candidate]:
    """The start that a study takes over from the one before."""
    return [before.candidate] if before else []
