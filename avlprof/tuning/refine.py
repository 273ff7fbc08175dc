"""The second stage of a search: every layer's share moved by itself, around the best scalars.

Bits of single layers come from the probe: moved one by one beside the shares they were measured to need
more trials than they gain (docs/tuning.md).
"""

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
from avlprof.allocators.sensitivity import split_bytes
from avlprof.budgets import vision_share
from avlprof.policy import BITS, Policy, counted_layers, packed_share, parse_policy
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

SAME, SPLIT = "same", "split by the probe"


@dataclass(frozen=True)
class Moved:
    """A policy whose layers' shares are multiplied by `exp` of a step each, and scaled to the budget.

    `keep` and `compute` have one step a layer, 0 where policies do not act; without a read budget
    `compute` is empty. `bits` says which of two policies the `base` is, where there are two: the one that
    is refined (`SAME`), or that with bytes `SPLIT` by the probe; else it is empty.
    """

    base: Policy
    keep: tuple[float, ...]
    compute: tuple[float, ...] = ()
    bits: str = ""

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
        steps |= {f"compute_{i}": self.compute[i] for i in own if self.compute}
        return steps | ({"bits": self.bits} if self.bits else {})


@dataclass(frozen=True)
class LayerSpace:
    """All `Moved` of one policy: a step in [-`REACH`, `REACH`] for each layer's kept share.

    With a read budget each layer's computed share has a step too. Layers that no policy acts on have none.
    `split` is the policy with bytes split by the probe, around which shares are moved as well.
    """

    base: Policy
    layers: int
    reads: bool
    split: Policy | None = None

    def suggest(self, trial: Trial, budget: Budget) -> Moved:
        """Ask a trial for a step in each layer."""
        own = counted_layers(budget.prompts, self.layers)
        base, bits = self.base, ""
        if self.split is not None:
            bits = trial.suggest_categorical("bits", (SAME, SPLIT))
            base = self.split if bits == SPLIT else self.base

        def steps(name: str) -> tuple[float, ...]:
            asked = {i: trial.suggest_float(f"{name}_{i}", -REACH, REACH) for i in own}
            return tuple(asked.get(i, 0.0) for i in range(self.layers))

        return Moved(base, steps("keep"), steps("compute") if self.reads else (), bits)

    def starts(self) -> list[Moved]:
        """The policy as it is, and that with bytes split by the probe."""
        still = (0.0,) * self.layers
        steps = still, still if self.reads else ()
        if self.split is None:
            return [Moved(self.base, *steps)]
        return [Moved(self.base, *steps, SAME), Moved(self.split, *steps, SPLIT)]


def split_by_probe(
    policy: Policy, evidence: Evidence, budget: Budget, bits: Sequence[int] = BITS
) -> Policy | None:
    """The policy with the bytes of vision split over layers, in tokens and bits, as the probe says.

    None where nothing was probed in bits, the policy stores all in full, or the split changes nothing.
    See `split_bytes`. What ranks tokens, text and refreshes stay.
    """
    if evidence.bit_damage is None or evidence.damage is None or not policy.packs:
        return None
    prompts, layers = budget.prompts, evidence.layers
    room = vision_share(prompts, layers, budget.memory, policy.text)
    prices = {number: packed_share(number, prompts[0].group) for number in bits}
    own = counted_layers(prompts, layers)
    shares, each = split_bytes(evidence.of_governed(), room, prices)
    numbers, kept = list(policy.bits(layers)), list(policy.keep(layers))
    for at, layer in enumerate(own):
        numbers[layer], kept[layer] = each[at], float(shares[at])
    changed = policy.model_copy(update={"vision_bits": each[0] if len(set(each)) == 1 else tuple(numbers)})
    compute = policy.compute(layers)
    divided = spread(
        changed, [max(share, LEAST_SHARE) for share in kept], budget, follow=lambda keep: compute
    )
    return None if divided.hash == policy.hash else divided


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
    evidence, budget = objective.evidence, objective.budget
    split = split_by_probe(policy, evidence, budget, settings.space.bits)
    space = LayerSpace(policy, evidence.layers, budget.read is not None, split)
    return run_trials(
        find_storage(own_folder),
        replace(settings, trials=settings.refining, refine=0, sampler=SAMPLER),
        replace(objective, space=space),
        watch=watch,
    )


def is_refined(trial: FrozenTrial) -> bool:
    """Whether a trial is of the second stage."""
    return any(name.startswith("keep_") for name in trial.params)
