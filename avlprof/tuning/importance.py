"""What each parameter of a search is worth: fANOVA over its trials, and one knob moved at a time."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from avlprof.evaluation.intervals import paired_difference
from avlprof.policy import FULL, Policy, TextPolicy
from avlprof.tuning.candidate import WHOLE, Budget, Candidate
from avlprof.tuning.storages._base import quiet, trials_in
from avlprof.watch import SILENT, Part, Watch

FILE = "importances.csv"
LEAST = 20
"""A forest over fewer trials says little; the starts of the default space are 17."""
TREES, RESAMPLES = 16, 20
COLUMNS = ("parameter", "importance", "low", "high", "trials")
KNOBS = ("knob", "value", "plain", "change", "low", "high")

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from avlprof.tuning.prepared import Prepared


def parameter_importances(study: optuna.Study) -> pd.DataFrame:
    """How much of the variance of the score each parameter explains by itself, over the whole space.

    fANOVA fits a forest to the trials and integrates over all values alike, so a parameter that
    the sampler settled early counts in full. PED-ANOVA compares the best trials with all trials, and
    where nearly all have the same good scorer it sees none. Trials that were stopped early count with
    the mean of the samples that they saw: without them the bad half of the space would be missing. A
    parameter that only some trials have (`midpoint`) is left out. Nothing is said about small
    changes around the winner: see `knob_effects`.

    Source: Hutter, Hoos and Leyton-Brown, "An Efficient Approach for Assessing Hyperparameter
    Importance", ICML 2014.

    Returns:
        One row a parameter, the largest first: `parameter, importance`, `low, high` (95% of
        what resampled trials give: how much hangs on single trials), `trials`. Importances add up
        to 1: what parameters explain only together is left out. Empty with fewer than 20 finished
        trials, or when all have the same score.
    """
    done = trials_in(study, TrialState.COMPLETE)
    values = np.array([trial.value for trial in done], float)
    if len(done) < LEAST or not np.ptp(values):
        return pd.DataFrame(columns=list(COLUMNS))
    shares = _importances(done)
    rng = np.random.default_rng(0)
    picks = [rng.integers(len(done), size=len(done)) for _ in range(RESAMPLES)]
    again = pd.DataFrame([_importances([done[i] for i in pick]) for pick in picks if np.ptp(values[pick])])
    rows = []
    for name, share in sorted(shares.items(), key=lambda item: (-item[1], item[0])):
        low, high = np.percentile(again[name], (2.5, 97.5))
        rows.append((name, share, min(low, share), max(high, share), len(done)))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def noted_table(path: Path, columns: Sequence[str], dtype: dict[str, type] | None = None) -> pd.DataFrame:
    """A table that a proof noted; without rows, and with a warning, where the file is damaged."""
    try:
        table = pd.read_csv(path, keep_default_na=False, dtype=dtype)
        if set(columns) <= set(table.columns):
            return table
        reason = f"it has no column '{next(name for name in columns if name not in table.columns)}'"
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
    _log.warning("%s is left out: %s", path, reason)
    return pd.DataFrame(columns=list(columns))


def noted_importances(folder: Path, study: optuna.Study) -> pd.DataFrame:
    """The importances that the proof noted, or new ones if trials came since or it is not done."""
    done = trials_in(study, TrialState.COMPLETE)
    if (folder / FILE).exists():
        noted = noted_table(folder / FILE, COLUMNS)
        if len(noted) and noted["trials"].iloc[0] == len(done):
            return noted
    return parameter_importances(study)


def importance_rows(folder: Path, study: optuna.Study) -> list[dict[str, str]]:
    """Importances as lines of a table for people; none with too few trials."""
    return [
        {
            "parameter": row["parameter"],
            "importance": f"{row['importance']:.1%}",
            "95% of resampled trials": f"{row['low']:.1%} to {row['high']:.1%}",
        }
        for row in noted_importances(folder, study).to_dict("records")
    ]


def _importances(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    # brings scikit-learn, which takes seconds and only a study with enough trials needs
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    create = optuna.trial.create_trial
    with quiet():
        apart = optuna.create_study()
        apart.add_trials(
            [create(value=t.value, params=t.params, distributions=t.distributions) for t in trials]
        )
    evaluator = FanovaImportanceEvaluator(n_trees=TREES, seed=0)
    shares = get_param_importances(apart, evaluator=evaluator)
    return {name: float(value) for name, value in shares.items()}


PLAIN: Mapping[str, Any] = asdict(
    Candidate(
        refresh_interval=0,
        leading=0,
        text_share=1.0,
        vision_bits=FULL,
        core_prompt=0.0,
        core_memory=0.0,
        text_bits=FULL,
        pictures=WHOLE,
    )
)
"""What each knob is put back to: the plain candidate, a core that stays, all text, 16 bits, and pictures as
they are (`pictures` stands for their share too)."""


def knob_effects(
    winner: Candidate, prepared: Prepared, budget: Budget, watch: Watch = SILENT
) -> pd.DataFrame:
    """How much worse the cheap score gets when one knob of the winner goes back to plain.

    Unlike importances that are fitted to a study's trials, this does not depend on where the
    sampler chose to look; it says nothing about two knobs at once.

    Returns:
        One row a knob that the winner turned, the largest first: `knob, value, plain`, and `change,
        low, high` (mean over samples with its paired 95% interval; above 0: the knob helps). Bits of text
        are left out where text in 16 needs more than the budget.
    """
    values = asdict(winner)
    layers, refreshed = prepared.evidence.layers, budget.refreshed(winner.refresh_interval, winner.refresh)
    turned = [name for name in winner.params(budget) if values[name] != PLAIN[name]]
    turned = [name for name in turned if name != "picture_share"]  # which goes with `pictures`
    if winner.shown is not None:
        values["pictures"] = f"{winner.pictures} to {winner.picture_share:g}"
    if winner.text_share is None and not budget.affords(TextPolicy(), layers, refreshed):
        turned = [name for name in turned if name != "text_bits"]
    back = []
    for name in turned:
        plain = {name: PLAIN[name]} | ({"refresh_interval": 0} if name == "leading" else {})
        back.append(replace(winner, **plain).policy(prepared.evidence, budget))
    own = winner.policy(prepared.evidence, budget)
    ours, *theirs = prepared.cheap_scores([own, *back], Part(watch, "knobs"))
    rows = []
    for name, without in zip(turned, theirs, strict=True):
        gap = paired_difference(without, ours).difference
        rows.append(
            {
                "knob": name,
                "value": _text(values[name]),
                "plain": _text(PLAIN[name]),
                "change": gap.mean,
                "low": gap.low,
                "high": gap.high,
            }
        )
    table = pd.DataFrame(rows, columns=list(KNOBS))
    return table.sort_values("change", ascending=False, kind="stable", ignore_index=True)


def with_head_effect(table: pd.DataFrame, winner: Policy, before: Policy, prepared: Prepared) -> pd.DataFrame:
    """The knobs and a row `head_shares`: what it gains that the winner's KV heads differ in their counts.

    `before` is the policy whose heads were moved; columns and order as in `knob_effects`.
    """
    gap = paired_difference(prepared.cheap(before), prepared.cheap(winner)).difference
    value = f"{winner.heads}, head_floor {winner.head_floor:g}"
    row = ("head_shares", value, before.heads, gap.mean, gap.low, gap.high)
    own = pd.DataFrame([row], columns=list(KNOBS))
    whole = pd.concat([table, own]) if len(table) else own
    return whole.sort_values("change", ascending=False, kind="stable", ignore_index=True)


def _text(value: object) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
