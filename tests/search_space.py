"""A search space with evidence for all of it, and what a study of it came to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from optuna.trial import TrialState

from avlprof.testing.allocators import random_evidence
from avlprof.tuning import Space
from avlprof.tuning.evidence import LEVELS

ALLOCATORS = ("uniform", "pyramid", "coverage", "sensitivity")
SPACE = Space(ALLOCATORS, ("last_query", "instruction", "accumulated", "key_diversity", "value_norm"))


class ByParts:
    """As much of `Scores` as a plain `parts(policy)`, one list of scores for each batch of samples, gives."""

    def batches(self):
        begun = {}

        def score(policies):
            return [next(begun.setdefault(id(policy), self.parts(policy))) for policy in policies]

        while True:
            yield score


def scored_alone(objective, trial):
    """The value of one trial."""
    [(_, value)] = objective.score([(trial, objective.suggest(trial))])
    return value


def probed_evidence(layers, count, seed):
    """Random evidence with damage at the levels of the probe."""
    rng = np.random.default_rng(seed)
    damage = np.sort(rng.exponential(size=(layers, len(LEVELS))), axis=1)[:, ::-1].copy()
    damage[:, -1] = 0.0
    return replace(random_evidence(layers, count, rng), damage=damage, damage_levels=np.array(LEVELS))


def outcome(study):
    """What the finished trials were and gave, in order."""
    return [
        (trial.params, trial.value, trial.user_attrs["policy"])
        for trial in study.get_trials(states=(TrialState.COMPLETE,))
    ]
