"""The best trials of a study that go on."""

from __future__ import annotations

import optuna
from optuna.trial import FrozenTrial, TrialState

from avlprof.errors import UserError


def finalists(study: optuna.Study, count: int, *more: optuna.Study) -> list[FrozenTrial]:
    """The best `count` fully scored trials of one study or several with different policies, best first."""
    trials = [
        trial
        for each in (study, *more)
        for trial in each.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if trial.user_attrs.get("complete") and trial.value is not None
    ]
    if not trials:
        raise UserError("the study has no finished trial; run 'avlprof tune' again with more --trials")
    best: dict[str, FrozenTrial] = {}
    for trial in sorted(trials, key=lambda t: (t.value, t.number)):
        best.setdefault(trial.user_attrs["policy"], trial)
    return list(best.values())[:count]
