"""Trials that their worker did not finish, queued once more."""

from __future__ import annotations

import copy
import warnings

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

HISTORY = "retry_history"


def retry(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a trial again with the parameters that it has so far; again is harmless.

    Optuna keeps the numbers of the earlier attempts. What the trial noted about itself is left
    behind, so that the next attempt tells of its own worker and score.
    """
    others = study.get_trials(deepcopy=False)
    if any(other.system_attrs.get(HISTORY, [])[-1:] == [trial.number] for other in others):
        return
    again = copy.deepcopy(trial)
    again.user_attrs = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        RetryHeartbeatStaleTrialCallback()(study, again)


def give_up(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a running trial again and mark it as failed.

    In this order: a process that is killed in between leaves a trial that is given up by the
    next, and not one that is lost.
    """
    retry(study, trial)
    study.tell(trial.number, state=TrialState.FAIL)
