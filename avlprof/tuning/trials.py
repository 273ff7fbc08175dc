"""The trials of a study, one after another; which one is next follows from the study alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState

from avlprof.tuning.objective import Objective
from avlprof.tuning.settings import Settings
from avlprof.tuning.space import Space
from avlprof.tuning.storage import give_up_running, mend_journal, open_study, quiet

Told = Callable[[int, int], None]


def run_trials(
    folder: Path,
    settings: Settings,
    space: Space,
    objective: Objective,
    *,
    progress: Told | None = None,
    on_trial: Callable[[optuna.Study, FrozenTrial], None] | None = None,
) -> optuna.Study:
    """Run the study of a folder until it has `settings.trials` finished trials.

    The starts of the space come first, in their order, then the sampler's. The sampler is seeded
    by seed and number of finished trials, so a study that was stopped at any point goes on with
    the very trials of one that was not; a trial that was under way is tried again.

    Only for a folder that no other process works on.
    """
    tell = progress or (lambda done, total: None)
    mend_journal(folder)
    with quiet():
        study = open_study(folder, pruner=_pruner(settings.prune))
        give_up_running(study)
        starts = [start.params(objective.budget) for start in space.starts()]
        done = finished_trials(study)
        tell(done, settings.trials)
        while done < settings.trials:
            study.sampler = optuna.samplers.TPESampler(seed=_seed(settings.seed, done), n_startup_trials=10)
            _queue_start(study, starts)
            study.optimize(objective, n_trials=1, callbacks=[on_trial] if on_trial else None)
            done = finished_trials(study)
            tell(done, settings.trials)
    return study


def finished_trials(study: optuna.Study) -> int:
    """Trials that have a value."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def _queue_start(study: optuna.Study, starts: list[dict[str, Any]]) -> None:
    """Make the first start that is not finished the next trial, unless one waits already."""
    known = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.WAITING))
    if any(trial.state == TrialState.WAITING for trial in known):
        return
    finished = [trial.system_attrs.get("fixed_params") for trial in known]
    left = next((start for start in starts if start not in finished), None)
    if left is not None:
        study.enqueue_trial(left)


def _seed(seed: int, done: int) -> int:
    return int(np.random.SeedSequence([seed, done]).generate_state(1)[0])


def _pruner(prune: bool) -> optuna.pruners.BasePruner:
    if not prune:
        return optuna.pruners.NopPruner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return optuna.pruners.WilcoxonPruner(p_threshold=0.05, n_startup_steps=8)
