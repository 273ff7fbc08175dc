"""What is in a study's folder, at a glance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from avlprof.errors import UserError
from avlprof.policy import Policy, load_policy
from avlprof.locks import is_locked
from avlprof.tuning.storage import StudyMeta, find_place, quiet, read_meta, read_study
from avlprof.tuning.trials import WANTED

POLICY = "policy.yaml"


@dataclass(frozen=True)
class Overview:
    """A study: what it searches, how far it is and what it found.

    `best` is the lowest score of a trial that saw all samples, in units of the objective; `winner`
    the proved policy. `state` is `new` (no trial yet), `running`, `stopped` (the same command goes
    on), `unproved` (the trials are done, the proof is not), `proved` or `out of reach` (its database
    cannot be read).
    """

    folder: Path
    meta: StudyMeta
    state: str
    done: int
    wanted: int | None
    best: float | None
    winner: Policy | None

    def row(self) -> dict[str, Any]:
        """The study as a line of a table; the score is the task's metric on held-out samples."""
        origin = self.winner.provenance if self.winner else None
        score = origin.scores.get(self.winner.name) if self.winner and origin else None
        return {
            "name": self.folder.resolve().name,
            "model": self.meta.model,
            "task": self.meta.task,
            "budget": self.meta.budget,
            "read budget": self.meta.read_budget,
            "trials": self.done,
            "wanted": self.wanted,
            "objective": self.meta.objective,
            "best": self.best,
            "held-out": score.mean if score else None,
            "state": self.state,
        }


def studies_below(root: Path) -> list[Path]:
    """The folders of studies at or below a folder, sorted."""
    return sorted(path.parent for path in root.glob("**/study.json"))


def overview(folder: Path) -> Overview:
    """A study at a glance; nothing is written.

    Raises:
        UserError: the folder holds no study.
    """
    meta = read_meta(folder)
    winner = load_policy(folder / POLICY) if (folder / POLICY).exists() else None
    try:
        place = find_place(folder)
        begun = place.exists()
    except UserError:
        return Overview(folder, meta, "out of reach", 0, None, None, winner)
    at_it = is_locked(folder / ".lock")
    if not begun:
        return Overview(folder, meta, "running" if at_it else "new", 0, None, None, winner)
    study = read_study(folder)
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    wanted = study.user_attrs.get(WANTED)
    best = best_trials(study, 1)
    state = "stopped"
    if at_it or place.busy(study):
        state = "running"
    elif wanted is not None and len(done) >= wanted:
        state = "unproved" if winner is None else "proved"
    return Overview(folder, meta, state, len(done), wanted, best[0].value if best else None, winner)


def best_trials(study: optuna.Study, count: int) -> list[FrozenTrial]:
    """The best trials that saw all samples, best first."""
    with quiet():
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    whole = [trial for trial in done if trial.user_attrs.get("complete")]
    return sorted(whole, key=lambda trial: (trial.value, trial.number))[:count]


def trial_rows(trials: list[FrozenTrial]) -> list[dict[str, Any]]:
    """Trials as lines of a table, all with the same columns; parameters that one lacks are None."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    return [
        {
            "trial": trial.number,
            "score": trial.value,
            "live": trial.user_attrs.get("live_share"),
            "read": trial.user_attrs.get("read_share"),
            "samples": trial.user_attrs.get("samples"),
            **{name: trial.params.get(name) for name in names},
        }
        for trial in trials
    ]


def knob_sentences(folder: Path) -> list[str]:
    """Which of the winner's scalars matter, most first, from what the proof noted."""
    path = folder / "knobs.csv"
    if not path.exists():
        return []
    return [
        f"{row['knob']} {row['value']} instead of {row['plain']}: "
        f"{row['change']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
        for row in pd.read_csv(path, keep_default_na=False, dtype={"value": str, "plain": str}).to_dict(
            "records"
        )
    ]
