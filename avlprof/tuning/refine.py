"""What follows the scalars of a search: the share of every layer moved by itself, then that of every KV head.

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
from avlprof.policy import BITS, HEAD_FLOOR, Policy, counted_layers, packed_share, parse_policy
from avlprof.tuning.candidate import Budget, spread
from avlprof.tuning.objective import Objective, Points
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
    prompts, layers = budget.shrunk(policy.pictures).prompts, evidence.layers
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


FIXED = 1.0
"""The `head_floor` at which shares say all; with even ones it is a set for each KV head."""

FLOORS = (HEAD_FLOOR, 0.5, FIXED)
"""What a trial may choose between; at 0 shares would say nothing."""

EVEN, TRACED = "even", "traced"

HeadSteps = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class MovedHeads:
    """A policy in which KV heads differ in their counts: `heads: adaptive`, with a share for each head.

    Where they begin, and `steps`, have one number for each KV head of each layer. A head's share is where it
    begins times `exp` of its step, over the mean of its layer; a layer's own share stays, and with it all
    bytes. `origin` says where they begin where there is a choice (`EVEN` or `TRACED`); else it is empty.
    """

    base: Policy
    begin: HeadSteps
    steps: HeadSteps
    floor: float
    origin: str = ""

    def policy(self, evidence: Evidence, budget: Budget, name: str = "tuned") -> Policy:
        """The policy, at the bytes of its `base`; fixed and even shares are a set for each KV head."""
        shares = tuple(_over_mean(own, step) for own, step in zip(self.begin, self.steps, strict=True))
        even = all(share == 1.0 for own in shares for share in own)
        update: dict[str, Any] = {"name": name, "heads": "adaptive", "head_floor": self.floor}
        update["head_shares"] = None if even else shares
        if even and self.floor == FIXED:
            update |= {"heads": "kv_head", "head_floor": HEAD_FLOOR}
        return self.base.model_copy(update=update)

    def params(self, budget: Budget) -> dict[str, Any]:
        """Floor, origin and the steps of the heads that can be moved, as Optuna parameters."""
        layers = _movable(self.base, len(self.steps), budget)
        values: dict[str, Any] = {"head_floor": self.floor}
        values |= {"head_shares": self.origin} if self.origin else {}
        return values | {
            f"head_{at}_{i}": step for at in layers for i, step in enumerate(self.steps[at][:-1])
        }


@dataclass(frozen=True)
class HeadSpace:
    """All `MovedHeads` of one policy: a floor, and a step in [-`REACH`, `REACH`] for each KV head.

    The last head of a layer has none, since shares count over their mean; nor has a layer that keeps all or
    nothing. `traced` are the shares of a run of single heads (`avlprof.analysis.heads`), as `head_shares`
    of a policy, around which shares are moved as well.
    """

    base: Policy
    layers: int
    kv_heads: int
    traced: HeadSteps | None = None

    def movable(self, budget: Budget) -> list[int]:
        """The layers whose heads can be moved against each other."""
        return _movable(self.base, self.layers, budget)

    def suggest(self, trial: Trial, budget: Budget) -> MovedHeads:
        """Ask a trial for a floor, and for a step of each head."""
        layers = self.movable(budget)
        floor = trial.suggest_categorical("head_floor", FLOORS)
        origin = "" if self.traced is None else trial.suggest_categorical("head_shares", (EVEN, TRACED))

        def steps(layer: int) -> tuple[float, ...]:
            if layer not in layers:
                return (0.0,) * self.kv_heads
            names = [f"head_{layer}_{head}" for head in range(self.kv_heads - 1)]
            return (*(trial.suggest_float(name, -REACH, REACH) for name in names), 0.0)

        return MovedHeads(
            self.base, self._begin(origin), tuple(steps(i) for i in range(self.layers)), floor, origin
        )

    def starts(self) -> list[MovedHeads]:
        """The policy with a set for each KV head, the traced shares, and counts that prompts alone choose.

        One that has counts by head already begins as it is.
        """
        still = ((0.0,) * self.kv_heads,) * self.layers
        even = "" if self.traced is None else EVEN
        floors = [self.base.head_floor] if self.base.heads == "adaptive" else [FIXED, HEAD_FLOOR]
        starts = [MovedHeads(self.base, self._begin(even), still, floor, even) for floor in floors]
        if self.traced is not None:
            starts.insert(1, MovedHeads(self.base, self.traced, still, FIXED, TRACED))
        return starts

    def _begin(self, origin: str) -> HeadSteps:
        if origin == TRACED and self.traced is not None:
            return self.traced
        return ((1.0,) * self.kv_heads,) * self.layers


def _movable(policy: Policy, layers: int, budget: Budget) -> list[int]:
    keep = policy.keep(layers)
    return [layer for layer in counted_layers(budget.prompts, layers) if 0.0 < keep[layer] < 1.0]


def _over_mean(begin: Sequence[float], steps: Sequence[float]) -> tuple[float, ...]:
    moved = [share * math.exp(step) for share, step in zip(begin, steps, strict=True)]
    mean = sum(moved) / len(moved)
    return tuple(round(share / mean, 4) for share in moved)


FOLDER, HEADS_FOLDER = "refined", "heads"
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
    evidence, budget = objective.evidence, objective.budget
    split = split_by_probe(policy, evidence, budget, settings.space.bits)
    space = LayerSpace(policy, evidence.layers, budget.read is not None, split)
    return _moved(folder / FOLDER / policy.hash, settings, settings.refining, objective, space, watch)


def refine_heads(
    folder: Path,
    settings: Settings,
    objective: Objective,
    base: FrozenTrial,
    kv_heads: int,
    watch: Watch = SILENT,
) -> optuna.Study | None:
    """Move every KV head's share around a trial's policy, `settings.refine_heads` times; resumes.

    As `refine`, in `<folder>/heads/<hash of the policy>`. None, and a sentence, where the policy keeps all
    or nothing in every layer, so that heads have nothing to give each other.

    Args:
        kv_heads: of each layer, two or more.
    """
    policy = parse_policy(base.user_attrs["policy"], f"trial {base.number}")
    shares = objective.evidence.head_shares
    traced = None if shares is None else tuple(tuple(map(float, own)) for own in shares)
    space = HeadSpace(policy, objective.evidence.layers, kv_heads, traced)
    if not space.movable(objective.budget):
        watch.say(
            "no trial moves heads: the best policy keeps all or nothing in every layer, so its heads have "
            "nothing to give each other"
        )
        return None
    own_folder = folder / HEADS_FOLDER / policy.hash
    return _moved(own_folder, settings, settings.refine_heads, objective, space, watch)


def _moved(
    folder: Path, settings: Settings, trials: int, objective: Objective, space: Points, watch: Watch
) -> optuna.Study:
    """So many trials around one policy, in a study of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    own = replace(settings, trials=trials, refine=0, refine_heads=0, sampler=SAMPLER)
    return run_trials(find_storage(folder), own, replace(objective, space=space), watch=watch)


def is_refined(trial: FrozenTrial) -> bool:
    """Whether a trial moves single layers."""
    return any(name.startswith("keep_") for name in trial.params)


def moves_heads(trial: FrozenTrial) -> bool:
    """Whether a trial moves single KV heads."""
    return any(name.startswith("head_") for name in trial.params)
