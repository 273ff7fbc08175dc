"""The smallest budget at which a tuned policy loses no more than allowed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from avlprof.analysis import Profile
from avlprof.errors import UserError, counted
from avlprof.evaluation import PairedDifference
from avlprof.evaluation.doubts import dense_doubt, tie_doubts
from avlprof.files import write_text
from avlprof.models import LoadedModel
from avlprof.tasks import Task
from avlprof.tuning.prepared import prepare
from avlprof.tuning.settings import Settings
from avlprof.tuning.sweep import neighbour
from avlprof.tuning.tune import Search, Tuned, prove_winner, search
from avlprof.tuning.workers import Workers
from avlprof.watch import SILENT, Watch

RESOLUTION = 0.02


@dataclass(frozen=True)
class Smallest:
    """The study at the smallest budget that held the drop on the search split, and its one test.

    `tried` are the budgets with the mean drop of their winners on the search split, in the order in
    which they were tried.
    """

    tuned: Tuned
    budget: float
    drop: float
    tried: tuple[tuple[float, float], ...]

    @property
    def against_dense(self) -> PairedDifference:
        """The winner minus dense on held-out samples."""
        return self.tuned.verdict.differences["dense"]

    @property
    def holds(self) -> bool:
        """Whether the held-out drop is shown to be at most `drop`, with 97.5% confidence."""
        return not self.doubts and self.against_dense.difference.low > -self.drop

    @property
    def doubts(self) -> list[str]:
        """What keeps the held-out samples from showing it, as in a `Verdict`."""
        table = self.tuned.proof.answers
        dense = table.loc[table["policy"] == "dense", "score"].to_numpy(dtype=float)
        nothing = dense_doubt(dense)
        return [*([nothing] if nothing else []), *tie_doubts(self.against_dense, self.drop, dense, "dense")]

    def sentence(self) -> str:
        """The budget, and what held-out samples say of it."""
        gap = self.against_dense.difference
        why = f": {'; '.join(self.doubts)}" if self.doubts else ""
        verdict = "is shown" if self.holds else f"is not shown{why}"
        return (
            f"smallest budget {self.budget:g}: tuned - dense is {gap.mean:+.3f} "
            f"[{gap.low:+.3f}, {gap.high:+.3f}] on {counted(gap.samples, 'held-out sample')}; "
            f"a drop of at most {self.drop:g} {verdict}"
        )

    def write(self, folder: Path) -> Path:
        """What was tried, and the outcome, as JSON in a folder."""
        gap = self.against_dense.difference
        record = {
            "max_drop": self.drop,
            "budget": self.budget,
            "tried": [{"budget": budget, "drop": round(loss, 6)} for budget, loss in self.tried],
            "held_out": {"mean": gap.mean, "low": gap.low, "high": gap.high, "samples": gap.samples},
            "shown": self.holds,
        }
        path = folder / "smallest.json"
        write_text(path, json.dumps(record, indent=1) + "\n")
        return path


def check_wanted(drop: float, settings: Settings) -> None:
    """`UserError` unless a drop is in range and no read budget is set."""
    if not 0.0 <= drop < 1.0:
        raise UserError(f"max_drop must be in [0, 1), in units of the task's metric, got {drop}")
    if settings.read_budget is not None:
        raise UserError("the smallest memory budget is looked for; leave the read budget out")


def smallest(
    loaded: LoadedModel,
    task: Task,
    profile: Profile,
    folder: Path,
    drop: float,
    settings: Settings | None = None,
    *,
    workers: Workers | None = None,
    watch: Watch = SILENT,
) -> Smallest:
    """Bisect over memory budgets for the smallest that loses at most `drop` of the metric.

    One study a step, in `<folder>/b<budget>`, started from the best of the step before. A budget
    holds when the winner's mean loss against dense on the *search* split is at most `drop`;
    the bisection ends when the bracket is `RESOLUTION` wide. Only the budget at its upper end is
    tested on held-out samples, once. Bisection takes quality to rise with the budget; where
    noise makes it dip, a smaller budget that holds may be missed.

    Raises:
        UserError: as `tune`, `drop` is out of range, or a read budget is set.
    """
    settings = settings or Settings()
    check_wanted(drop, settings)
    prepared = prepare(loaded, task, profile, settings, watch)
    folder.mkdir(parents=True, exist_ok=True)
    tried: list[tuple[float, float]] = []
    holding: Search | None = None
    before: Search | None = None
    low, high = math.floor(prepared.least * 100) / 100, 1.0
    while high - low > RESOLUTION + 1e-9:
        middle = round((low + high) / 2, 2)
        watch.budget(middle)
        before = search(
            before.prepared if before else prepared,
            folder / f"b{middle:g}",
            middle,
            settings,
            starts=neighbour(before),
            probe=folder / "probe.json",
            workers=workers,
            watch=watch,
        )
        loss = float(np.mean(before.shortlist.dense - before.shortlist.winner.metric))
        tried.append((middle, loss))
        watch.say(f"budget {middle:g}: drop {loss:+.3f} on the search split")
        if loss <= drop + 1e-12:
            high, holding = middle, before
        else:
            low = middle
    if holding is None:
        raise UserError(
            f"no budget up to {high:g} holds a drop of {drop:g} on the search split "
            f"(the last one tried lost {tried[-1][1]:.3f}); allow more, or give more trials"
        )
    least = Smallest(prove_winner(holding, watch), high, drop, tuple(tried))
    least.write(folder)
    return least
