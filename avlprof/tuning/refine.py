"""The second stage of a study: its best scalars refined layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from avlprof.policy import parse_policy
from avlprof.tuning.layers import LayerSpace
from avlprof.tuning.objective import Objective
from avlprof.tuning.settings import Settings
from avlprof.tuning.trials import run_trials

FOLDER = "refined"
SAMPLER = "gp"


def refine(
    folder: Path,
    settings: Settings,
    objective: Objective,
    base: FrozenTrial,
    *,
    progress: Callable[[int, int], None] | None = None,
    on_trial: Callable[[optuna.Study, FrozenTrial], None] | None = None,
) -> optuna.Study:
    """Move every layer's share around those of a trial's policy, `settings.refining` times; resumes.

    The trials are a study of their own, in `<folder>/refined/<hash of the policy>`: when more
    scalar trials find another policy, it is refined anew. A Gaussian process proposes them, which
    learns a few continuous numbers from few trials; it was measured to beat as many more scalar
    trials (docs/tuning.md).
    """
    policy = parse_policy(base.user_attrs["policy"], f"trial {base.number}")
    place = folder / FOLDER / policy.hash
    place.mkdir(parents=True, exist_ok=True)
    space = LayerSpace(policy, objective.evidence.layers, objective.budget.read is not None)
    return run_trials(
        place,
        replace(settings, trials=settings.refining, refine=0, sampler=SAMPLER),
        space,
        replace(objective, space=space),
        progress=progress,
        on_trial=on_trial,
    )


def is_refined(trial: FrozenTrial) -> bool:
    """Whether a trial is of the second stage."""
    return "keep_0" in trial.params
