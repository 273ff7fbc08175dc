"""What the search may choose from, and where it starts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace

from optuna import Trial

from avlprof.allocators import ALLOCATORS, vision_share
from avlprof.errors import UserError
from avlprof.policy import Policy, live_share
from avlprof.registry import unknown
from avlprof.scorers import SCORERS
from avlprof.tuning.candidate import Budget, Candidate

HEADS = ("shared", "kv_head")


@dataclass(frozen=True)
class Space:
    """What the search may choose from.

    `refreshes` are the refresh intervals in steps (0: never); they count with a read budget only.

    Raises:
        UserError: a list is empty or names what is not known.
    """

    allocators: tuple[str, ...] = ("uniform", "pyramid", "coverage", "sensitivity")
    scorers: tuple[str, ...] = ("last_query", "instruction", "accumulated", "key_diversity", "value_norm")
    heads: tuple[str, ...] = HEADS
    refreshes: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32)

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name):
                raise UserError(f"{field.name} of the search space must name at least one, got none")
        for name in self.allocators:
            ALLOCATORS.get(name)
        for name in self.scorers:
            SCORERS.get(name)
        for name in self.heads:
            if name not in HEADS:
                raise unknown("kind of heads", name, HEADS)
        if min(self.refreshes) < 0:
            raise UserError(f"refreshes of the search space must be 0 or more, got {min(self.refreshes)}")

    def within(self, budget: Budget, layers: int) -> Space:
        """The part of the space in which every candidate can meet the budget.

        What a refresh interval reads at least is counted with all the vision KV that the memory
        budget allows, so that it holds for any spread over layers.

        Raises:
            UserError: system and text alone need more than a budget; the message says how much.
        """
        vision_share(budget.prompts, layers, budget.memory)
        if budget.read is None:
            return self
        always = live_share(Policy(vision_keep=0.0), budget.prompts, layers)
        steps = max(budget.answer_tokens, 1)
        stored = budget.memory - always
        least = {k: always + (steps // k if k else 0) / steps * stored for k in self.refreshes}
        feasible = tuple(k for k in self.refreshes if least[k] <= budget.read)
        if not feasible:
            enough = math.ceil(min(least.values()) * 1000 - 1e-9) / 1000
            raise UserError(
                f"read budget {budget.read:g} is below {enough:g}, what system, text and refreshes read "
                "alone; raise --read-budget or lower --budget"
            )
        return replace(self, refreshes=feasible)

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
        return replace(
            candidate,
            refresh_interval=trial.suggest_categorical("refresh_interval", self.refreshes),
            compute_temperature=trial.suggest_float("compute_temperature", 0.25, 4.0, log=True),
        )

    def starts(self) -> list[Candidate]:
        """The first trials: every allocator as it is, uniform first, then other scorers.

        The blend of 20% `coverage` is what `derive` makes of a profile alone.
        """
        usual = Candidate()
        plain = replace(
            usual,
            scorer=usual.scorer if usual.scorer in self.scorers else self.scorers[0],
            heads=usual.heads if usual.heads in self.heads else self.heads[0],
            refresh_interval=min(
                (k for k in self.refreshes if k >= usual.refresh_interval), default=max(self.refreshes)
            ),
        )
        allocators = sorted(self.allocators, key=lambda name: name != "uniform")
        starts = [replace(plain, allocator=name) for name in allocators]
        if "coverage" in allocators:
            starts.append(replace(plain, allocator="coverage", mix=0.2))
        others = [scorer for scorer in self.scorers if scorer != plain.scorer]
        for name in ("uniform", "sensitivity"):
            if name in allocators:
                starts += [replace(plain, allocator=name, scorer=scorer) for scorer in others]
        return starts

    def described(self) -> dict[str, tuple[int | str, ...]]:
        """The space as plain values, as a study notes it."""
        return {name: tuple(values) for name, values in asdict(self).items()}
