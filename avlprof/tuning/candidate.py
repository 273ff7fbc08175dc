"""A point of the search space, and the policy that it stands for at a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from optuna import Trial

from avlprof.allocators import Evidence, make_allocator, meet_budget, meet_read_budget, vision_share
from avlprof.errors import UserError
from avlprof.policy import Policy, PromptShape, ScorerSpec

REFRESHES = (0, 1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Budget:
    """What every trial must meet: memory, optionally reads, counted on these prompts."""

    memory: float
    read: float | None
    prompts: tuple[PromptShape, ...]
    answer_tokens: int


@dataclass(frozen=True)
class Candidate:
    """A handful of scalars that spread a budget over layers.

    `mix` parts of the allocator and the rest uniform; `temperature` sharpens (> 1) or flattens
    (< 1) what the allocator says; `floor` is the least kept share of a layer. With a read budget,
    `refresh_interval` is K and `compute_temperature` sharpens how reads follow the kept shares.
    """

    allocator: str = "uniform"
    mix: float = 1.0
    temperature: float = 1.0
    floor: float = 0.0
    scorer: str = "last_query"
    heads: str = "shared"
    refresh_interval: int = 8
    compute_temperature: float = 1.0

    def policy(self, evidence: Evidence, budget: Budget, name: str = "tuned") -> Policy:
        """The policy at the budget: never above it, at most one token a layer below."""
        prompts = budget.prompts
        target = vision_share(prompts, evidence.layers, budget.memory)
        sharp = make_allocator(self.allocator).shares(evidence, target) ** self.temperature
        mean = float(sharp.mean())
        shares = self.mix * (sharp / mean if mean > 0 else np.ones(evidence.layers)) + (1 - self.mix)
        keep = meet_budget(shares.tolist(), prompts, budget.memory, floor=self.floor)
        compute = None
        refresh = 0
        if budget.read is not None:
            refresh = self.refresh_interval
            compute = meet_read_budget(
                keep,
                prompts,
                refresh,
                budget.read,
                budget.answer_tokens,
                shares=[k**self.compute_temperature for k in keep],
            )
        return Policy(
            name=name,
            vision_keep=keep,
            vision_compute=compute,
            refresh_interval=refresh,
            scorer=ScorerSpec(name=self.scorer),
            heads="kv_head" if self.heads == "kv_head" else "shared",
        )

    def params(self, budget: Budget) -> dict[str, Any]:
        """The values as Optuna parameters; those that the budget does not feel are left out."""
        values = asdict(self)
        if budget.read is None:
            del values["refresh_interval"], values["compute_temperature"]
        return values


@dataclass(frozen=True)
class Space:
    """What the search may choose from."""

    allocators: tuple[str, ...] = ("uniform", "pyramid", "coverage", "sensitivity")
    scorers: tuple[str, ...] = ("last_query", "instruction", "accumulated", "key_diversity", "value_norm")
    heads: tuple[str, ...] = ("shared", "kv_head")
    refreshes: tuple[int, ...] = REFRESHES

    def suggest(self, trial: Trial, budget: Budget) -> Candidate:
        """Ask a trial for a candidate."""
        candidate = Candidate(
            allocator=trial.suggest_categorical("allocator", self.allocators),
            mix=trial.suggest_float("mix", 0.0, 1.0),
            temperature=trial.suggest_float("temperature", 0.25, 4.0, log=True),
            floor=trial.suggest_float("floor", 0.0, min(0.1, budget.memory)),
            scorer=trial.suggest_categorical("scorer", self.scorers),
            heads=trial.suggest_categorical("heads", self.heads),
        )
        if budget.read is None:
            return candidate
        return Candidate(
            **{
                **asdict(candidate),
                "refresh_interval": trial.suggest_categorical("refresh_interval", self.refreshes),
                "compute_temperature": trial.suggest_float("compute_temperature", 0.25, 4.0, log=True),
            }
        )

    def starts(self) -> list[Candidate]:
        """The first trials: every allocator as it is, and uniform with every scorer."""
        known = [Candidate(allocator=name) for name in self.allocators]
        known.append(Candidate(allocator="coverage", mix=0.2))
        known += [Candidate(scorer=name) for name in self.scorers if name != "last_query"]
        known += [Candidate(allocator="sensitivity", scorer=s) for s in self.scorers if s != "last_query"]
        return known


def feasible_refreshes(
    evidence: Evidence, budget: Budget, wanted: Sequence[int] = REFRESHES
) -> tuple[int, ...]:
    """The refresh intervals at which uniform shares can meet both budgets.

    Raises:
        UserError: there is none; the message is that of the least reading one.
    """
    if budget.read is None:
        return tuple(wanted)
    found, last = [], None
    for interval in wanted:
        try:
            Candidate(refresh_interval=interval).policy(evidence, budget)
            found.append(interval)
        except UserError as error:
            last = error
    if not found and last is not None:
        raise last
    return tuple(found)
