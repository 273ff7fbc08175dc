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
