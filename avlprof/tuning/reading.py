"""Looking at studies: where each is, and a trial's policy as a file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from avlprof.errors import UserError
from avlprof.locks import is_locked
from avlprof.policy import Policy, Provenance, load_policy, parse_policy
from avlprof.tuning.study import StudyMeta, finalists, find_place, quiet, read_meta, read_study
from avlprof.tuning.trials import WANTED
from avlprof.versions import __version__, versions

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


def export_policy(folder: Path, trial: int | None = None, max_read: float | None = None) -> Policy:
    """A policy of a study.

    Without options it is the winner that was proved on held-out samples, or the best trial when
    the study was stopped before the proof. `trial` takes that trial's policy; `max_read` the best
    fully scored one whose mean reads per step are at most that share of the dense prompt KV (a
    point of the front of quality against reads).

    Raises:
        UserError: no such study or trial, no trial reads so little, or both options are given.
    """
    if trial is not None and max_read is not None:
        raise UserError("give --trial or --max-read, not both")
    if max_read is not None and not 0.0 <= max_read <= 1.0:
        raise UserError(f"max_read must be in [0, 1], a share of the dense prompt KV, got {max_read}")
    meta = read_meta(folder)
    if trial is None and max_read is None and (folder / "policy.yaml").exists():
        return load_policy(folder / "policy.yaml")
    study = read_study(folder)
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if trial is not None:
        found = next((t for t in done if t.number == trial), None)
        if found is None:
            raise UserError(
                f"study {folder} has no finished trial {trial}; the {len(done)} finished ones are below "
                f"{1 + max((t.number for t in done), default=-1)}"
            )
        return _policy(found, meta, folder)
    ranked = finalists(study, len(done))
    if max_read is not None:
        ranked = [t for t in ranked if t.user_attrs["read_share"] <= max_read]
        if not ranked:
            least = min(t.user_attrs["read_share"] for t in finalists(study, len(done)))
            enough = math.ceil(least * 1000) / 1000
            raise UserError(f"no trial of {folder} reads {max_read:g} or less; the least is {enough:g}")
    return _policy(ranked[0], meta, folder)


def _policy(trial: FrozenTrial, meta: StudyMeta, folder: Path) -> Policy:
    policy = parse_policy(trial.user_attrs["policy"], f"trial {trial.number} of {folder}")
    name, scored = folder.resolve().name, trial.user_attrs["samples"]
    return policy.model_copy(
        update={
            "name": f"{name}-trial-{trial.number}",
            "provenance": Provenance(
                made_by=f"avlprof export {__version__}",
                model=meta.model,
                model_revision=meta.model_hash,
                model_hash=meta.model_hash,
                versions=versions(),
                task=meta.task,
                samples=scored,
                seed=meta.seed,
                run_hash=meta.run_hash,
                study=name,
                trial=trial.number,
                budget=meta.budget,
                read_budget=meta.read_budget,
                measured_budget=round(trial.user_attrs["live_share"], 6),
                measured_read_budget=round(trial.user_attrs["read_share"], 6),
                notes=f"KL to dense {trial.value:.4f} nat per token on {scored} of {meta.samples} samples of "
                f"split '{meta.split}'; not proved on held-out samples",
            ),
        }
    )
