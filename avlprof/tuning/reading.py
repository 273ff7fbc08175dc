"""Looking at studies: where each is, its trials, and a trial's policy."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from avlprof.errors import UserError, counted
from avlprof.locks import is_locked
from avlprof.policy import Policy, Provenance, load_policy, parse_policy
from avlprof.tuning.evidence import read_evidence
from avlprof.tuning.importance import KNOBS, noted_importances, noted_table
from avlprof.tuning.objective import MEANING
from avlprof.tuning.storages._base import quiet, trials_in
from avlprof.tuning.study import StudyMeta, begun_study, finalists, find_storage, read_meta, read_study
from avlprof.tuning.trials import TRIALS
from avlprof.versions import __version__, versions

POLICY = "policy.yaml"
ROW = (
    *("name", "model", "task", "budget", "read budget", "trials"),
    *("wanted", "objective", "best", "held-out", "state"),
)
"""Columns of `Overview.row`."""


@dataclass(frozen=True)
class Overview:
    """A study: what it searches, how far it is and what it found.

    `best` is the lowest score of a trial that saw all samples, in units of the objective; `winner`
    the policy of the proof. `done` of `trials` are finished. `state` is `new` (no trial yet), `running`,
    `stopped` (the same command goes on), `unproved` (the trials are done, the proof is not),
    `proved` (the winner is shown not to be inferior), `not shown` (it was tested and is not) or
    `out of reach` (its database cannot be read).
    """

    folder: Path
    meta: StudyMeta
    state: str
    done: int
    trials: int | None
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
            "wanted": self.trials,
            "objective": self.meta.objective,
            "best": self.best,
            "held-out": score.mean if score else None,
            "state": self.state,
        }


@dataclass(frozen=True)
class Study:
    """A study in a folder, to look at while it runs or when it is done; nothing is written.

    `meta` says what it searches. `avlprof.tune` makes studies and goes on with them.
    """

    folder: Path
    meta: StudyMeta

    @classmethod
    def open(cls, folder: Path | str) -> Study:
        """The study of a folder; `UserError` when there is none."""
        return cls(Path(folder), read_meta(Path(folder)))

    def overview(self) -> Overview:
        """How far it is and what it found: state, trials done and in all, best score, proved winner."""
        return overview(self.folder)

    def trials(self, best: int | None = None) -> pd.DataFrame:
        """The trials that saw all samples, or the `best` so many, best first.

        Returns:
            One row a trial: `trial, score` (of the objective, lower is better), `live, read`
            (shares of the dense prompt KV), `samples`, and a column a parameter.

        Raises:
            UserError: no trial was begun yet.
        """
        return pd.DataFrame(trial_rows(best_trials(self.optuna(), best)))

    def importances(self) -> pd.DataFrame:
        """What the score depends on over the whole space; see `parameter_importances`."""
        return noted_importances(self.folder, self.optuna())

    def export(self, trial: int | None = None, max_read: float | None = None) -> Policy:
        """The proved winner, a trial's policy, or the best that reads little; see `export_policy`."""
        return export_policy(self.folder, trial, max_read)

    def optuna(self) -> optuna.Study:
        """The study as Optuna's; `UserError` when no trial was begun yet."""
        return read_study(self.folder)


def studies_below(root: Path) -> list[Path]:
    """The folders of studies at or below a folder, sorted."""
    return sorted(path.parent for path in root.glob("**/study.json"))


def rows_below(root: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of a table of the studies at or below a folder, and sentences about those that are broken.

    A broken one has its name and the state `broken`; nothing is written.
    """
    rows, sentences = [], []
    for folder in studies_below(root):
        name = str(folder.relative_to(root)) if folder != root else folder.resolve().name
        try:
            rows.append(overview(folder).row() | {"name": name})
        except (UserError, OSError) as error:
            rows.append(dict.fromkeys(ROW) | {"name": name, "state": "broken"})
            sentences.append(f"study {folder} is broken: {error}")
    return rows, sentences


def overview(folder: Path) -> Overview:
    """A study at a glance; nothing is written.

    Raises:
        UserError: the folder holds no study.
    """
    meta = read_meta(folder)
    winner = load_policy(folder / POLICY) if (folder / POLICY).exists() else None
    try:
        storage = find_storage(folder)
        begun = storage.exists()
    except UserError:
        return Overview(folder, meta, "out of reach", 0, None, None, winner)
    at_it = is_locked(folder / ".lock")
    study = begun_study(folder) if begun else None
    if study is None:
        return Overview(folder, meta, "running" if at_it else "new", 0, None, None, winner)
    done = len(trials_in(study, TrialState.COMPLETE))
    trials = study.user_attrs.get(TRIALS)
    best = best_trials(study, 1)
    state = "stopped"
    if at_it or storage.busy(study):
        state = "running"
    elif trials is not None and done >= trials:
        state = _outcome(winner)
    return Overview(folder, meta, state, done, trials, best[0].value if best else None, winner)


def _outcome(winner: Policy | None) -> str:
    """What became of a study whose trials are done."""
    if winner is None:
        return "unproved"
    proof = winner.provenance.proof if winner.provenance else None
    return "proved" if proof is not None and proof.holds else "not shown"


def best_trials(study: optuna.Study, count: int | None = None) -> list[FrozenTrial]:
    """The best trials that saw all samples, or all such, best first."""
    with quiet():
        done = trials_in(study, TrialState.COMPLETE)
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
        for row in noted_table(path, KNOBS, {"value": str, "plain": str}).to_dict("records")
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
        raise UserError("give a trial or max_read, not both")
    if max_read is not None and not 0.0 <= max_read <= 1.0:
        raise UserError(f"max_read must be in [0, 1], a share of the dense prompt KV, got {max_read}")
    meta = read_meta(folder)
    if trial is None and max_read is None and (folder / POLICY).exists():
        return load_policy(folder / POLICY)
    study = read_study(folder)
    if trial is not None:
        return _policy(_finished(study, trial, folder), meta, folder)
    return _policy(_reading_at_most(study, max_read, folder), meta, folder)


def _finished(study: optuna.Study, number: int, folder: Path) -> FrozenTrial:
    done = trials_in(study, TrialState.COMPLETE)
    for trial in done:
        if trial.number == number:
            return trial
    raise UserError(
        f"study {folder} has no finished trial {number}; the {len(done)} finished ones are below "
        f"{1 + max((t.number for t in done), default=-1)}"
    )


def _reading_at_most(study: optuna.Study, max_read: float | None, folder: Path) -> FrozenTrial:
    """The best trial that saw all samples and reads so little."""
    ranked = finalists(study, len(trials_in(study, TrialState.COMPLETE)))
    low = [t for t in ranked if max_read is None or t.user_attrs["read_share"] <= max_read]
    if not low:
        least = min(t.user_attrs["read_share"] for t in ranked)
        enough = math.ceil(least * 1000) / 1000
        raise UserError(f"no trial of {folder} reads {max_read:g} or less; the least is {enough:g}")
    return low[0]


def _policy(trial: FrozenTrial, meta: StudyMeta, folder: Path) -> Policy:
    policy = parse_policy(trial.user_attrs["policy"], f"trial {trial.number} of {folder}")
    name, samples = folder.resolve().name, trial.user_attrs["samples"]
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
                samples=samples,
                seed=meta.seed,
                run_hash=meta.run_hash,
                study=name,
                trial=trial.number,
                budget=meta.budget,
                read_budget=meta.read_budget,
                measured_budget=round(trial.user_attrs["live_share"], 6),
                measured_read_budget=round(trial.user_attrs["read_share"], 6),
                governed=_governed(folder),
                notes=f"{_score(trial, meta)} on {samples} of {counted(meta.samples, 'sample')} of "
                f"split '{meta.split}'; not proved on held-out samples",
            ),
        }
    )


def _governed(folder: Path) -> tuple[int, ...] | None:
    """The layers that the study's policies act on, as its evidence says."""
    with contextlib.suppress(UserError):
        return read_evidence(find_storage(folder)).governed
    return None


def _score(trial: FrozenTrial, meta: StudyMeta) -> str:
    """A trial's score in words, as in `KL to dense 0.1234 nat per token`."""
    meaning, _, unit = MEANING[meta.objective].partition(" (")
    return f"{meaning} {trial.value:.4f} {unit.removesuffix(')')}".rstrip()
