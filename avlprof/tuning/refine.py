"""The second stage of a search: every layer's share moved by itself, around the best scalars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna import Trial
from optuna.trial import FrozenTrial

from avlprof.allocators import Evidence
from avlprof.policy import Policy, counted_layers, parse_policy
from avlprof.tuning.candidate import Budget, spread
from avlprof.tuning.objective import Objective
from avlprof.tuning.settings import Settings
from avlprof.tuning.study import find_storage
from avlprof.tuning.trials import run_trials
from avlprof.watch import SILENT, Watch

REACH = 1.0
"""Largest factor on a layer's share is e to this, before all are scaled to the budget."""

LEAST_SHARE = 1e-3
"""What a layer that keeps nothing counts as, so that a factor can move it."""


@dataclass(frozen=True)
class Moved:
    """A policy whose layers' shares are multiplied by `exp` of a step each, and scaled to the budget.

    `keep` and `compute` have one step a layer, 0 where policies do not act; without a read budget
    `compute` is empty.
    """

    base: Policy
    keep: tuple[float, ...]
    compute: tuple[float, ...] = ()

    def policy(self, evidence: Evidence, budget: Budget, name: str = "tuned") -> Policy:
        """The policy at the budget: never above it, at most one token a layer below."""
        layers = evidence.layers
        shares = _stretched(self.base.keep(layers), self.keep)
        moved = self.base.model_copy(update={"name": name})
        follow = _stretched(self.base.compute(layers), self.compute or (0.0,) * layers)
        return spread(moved, shares, budget, follow=lambda keep: follow)

    def params(self, budget: Budget) -> dict[str, Any]:
        """The steps of the layers that policies act on, as Optuna parameters."""
        own = counted_layers(budget.prompts, len(self.keep))
        steps = {f"keep_{i}": self.keep[i] for i in own}
        return steps | {f"compute_{i}": self.compute[i] for i in own if self.compute}


@dataclass(frozen=True)
class LayerSpace:
    """All `Moved` of one policy: a step in [-`REACH`, `REACH`] for each layer's kept share.

    With a read budget each layer's computed share has a step too. Layers that no policy acts on have none.
    """

    base: Policy
    layers: int
    reads: bool

    def suggest(self, trial: Trial, budget: Budget) -> Moved:
        """Ask a trial for a step in each layer."""
        own = counted_layers(budget.prompts, self.layers)

        def steps(name: str) -> tuple[float, ...]:
            asked = {i: trial.suggest_float(f"{name}_{i}", -REACH, REACH) for i in own}
            return tuple(asked.get(i, 0.0) for i in range(self.layers))

        return Moved(self.base, steps("keep"), steps("compute") if self.reads else ())

    def starts(self) -> list[Moved]:
        """The policy as it is."""
        still = (0.0,) * self.layers
        return [Moved(self.base, still, still if self.reads else ())]


def _stretched(shares: Sequence[float], steps: Sequence[float]) -> list[float]:
    return [max(share, LEAST_SHARE) * math.exp(step) for share, step in zip(shares, steps, strict=True)]


FOLDER = "refined"
SAMPLER = "gp"


def refine(
    folder: Path, settings: Settings, objective: Objective, base: FrozenTrial, watch: Watch = SILENT
) -> optuna.Study:
    """Move every layer's share around those of a trial's policy, `settings.refining` times; resumes.

    The trials are a study of their own, in `<folder>/refined/<hash of the policy>`: when more
    scalar trials find another policy, it is refined anew. A Gaussian process proposes them, which
    learns a few continuous numbers from few trials; it was measured to beat as many more scalar
    trials (docs/tuning.md).
    """
    policy = parse_policy(base.user_attrs["policy"], f"trial {base.number}")
    own_folder = folder / FOLDER / policy.hash
    own_folder.mkdir(parents=True, exist_ok=True)
    space = LayerSpace(policy, objective.evidence.layers, objective.budget.read is not None)
    return run_trials(
        find_storage(own_folder),
        replace(settings, trials=settings.refining, refine=0, sampler=SAMPLER),
        replace(objective, space=space),
        watch=watch,
    )


def is_refined(trial: FrozenTrial) -> bool:
    """Whether a trial is of the second stage."""
    return any(name.startswith("keep_") for name in trial.params)
