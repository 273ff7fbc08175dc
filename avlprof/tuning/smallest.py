"""The smallest budget at which a tuned policy loses no more than allowed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from avlprof.analysis import Profile
from avlprof.errors import UserError
from avlprof.evaluation import PairedDifference
from avlprof.files import write_text
from avlprof.models import LoadedModel
from avlprof.tasks import Task
from avlprof.tuning.prepared import Prepared, Progress
from avlprof.tuning.settings import Settings
from avlprof.tuning.space import Space
from avlprof.tuning.sweep import AtBudget, neighbour
from avlprof.tuning.tune import (
    OnTrial,
    Search,
    Told,
    Tuned,
    prove_winner,
    search,
)
from avlprof.tuning.workers import Crew

RESOLUTION = 0.02


@dataclass(frozen=True)
class Smallest:
    """The study at the smallest budget that held the drop on the search split, and its one test.

    `tried` are the budgets with the mean drop of their winners on the search split, in the order in
    which they were tried.
    """

    tuned: Tuned
    budget: float
    max_drop: float
    tried: tuple[tuple[float, float], ...]

    @property
    def against_dense(self) -> PairedDifference:
        """The winner minus dense on held-out samples."""
        return self.tuned.verdict.differences["dense"]

    @property
    def holds(self) -> bool:
        """Whether the held-out drop is shown to be at most `max_drop`, with 97.5% confidence."""
        return self.against_dense.difference.low > -self.max_drop

    def sentence(self) -> str:
        """The budget, and what held-out samples say of it."""
        gap = self.against_dense.difference
        shown = "is shown" if self.holds else "is not shown"
        return (
            f"smallest budget {self.budget:g}: tuned - dense is {gap.mean:+.3f} "
            f"[{gap.low:+.3f}, {gap.high:+.3f}] on {gap.samples} held-out samples; "
            f"a drop of at most {self.max_drop:g} {shown}"
        )


def smallest(
    loaded: LoadedModel,
    task: Task,
    profile: Profile,
    folder: Path,
    max_drop: float,
    settings: Settings | None = None,
    *,
    space: Space | None = None,
    progress: Progress | None = None,
    on_trial: OnTrial | None = None,
    on_budget: AtBudget | None = None,
    told: Told | None = None,
    crew: Crew | None = None,
) -> Smallest:
    """Bisect over memory budgets for the smallest that loses at most `max_drop` of the metric.

    One study a step, in `<folder>/b<budget>`, started from the best of the step before. A budget
    holds when the winner's mean loss against dense on the *search* split is at most `max_drop`;
    the bisection ends when the bracket is `RESOLUTION` wide. Only the budget that was found is
    tested on held-out samples, once. Bisection takes quality to rise with the budget; where
    noise makes it dip, a smaller budget that holds may be missed.

    Raises:
        UserError: as `tune`, `max_drop` is out of range, or a read budget is set.
    """
    if not 0.0 <= max_drop < 1.0:
        raise UserError(f"max_drop must be in [0, 1), in units of the task's metric, got {max_drop}")
    settings, space = settings or Settings(), space or Space()
    if settings.read_budget is not None:
        raise UserError("max_drop looks for a memory budget; leave --read-budget out")
    prepared = Prepared.make(loaded, task, profile, settings, space.scorers, progress)
    folder.mkdir(parents=True, exist_ok=True)
    tried: list[tuple[float, float]] = []
    held: Search | None = None
    before: Search | None = None

    def at(budget: float) -> Search:
        if on_budget:
            on_budget(budget)
        found = search(
            prepared,
            folder / f"b{budget:g}",
            replace(settings, budget=budget),
            space,
            warm=neighbour(before),
            probe=folder / "probe.json",
            progress=progress,
            on_trial=on_trial,
            told=told,
            crew=crew,
        )
        tried.append((budget, float(np.mean(found.played.dense - found.played.winner.metric))))
        if told:
            told(f"budget {budget:g}: drop {tried[-1][1]:+.3f} on the search split")
        return found

    low, high = math.floor(prepared.least * 100) / 100, 1.0
    while high - low > RESOLUTION + 1e-9:
        middle = round((low + high) / 2, 2)
        before = at(middle)
        if tried[-1][1] <= max_drop + 1e-12:
            high, held = middle, before
        else:
            low = middle
    if held is None:
        raise UserError(
            f"no budget up to {high:g} holds a drop of {max_drop:g} on the search split "
            f"(the last one tried lost {tried[-1][1]:.3f}); allow more, or give more --trials"
        )
    tuned = prove_winner(held, progress=progress, told=told)
    found = Smallest(tuned, high, max_drop, tuple(tried))
    gap = found.against_dense.difference
    record = {
        "max_drop": max_drop,
        "budget": high,
        "tried": [{"budget": budget, "drop": round(drop, 6)} for budget, drop in tried],
        "held_out": {"mean": gap.mean, "low": gap.low, "high": gap.high, "samples": gap.samples},
        "shown": found.holds,
    }
    write_text(folder / "smallest.json", json.dumps(record, indent=1) + "\n")
    return found
