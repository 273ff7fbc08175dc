"""A point of the search space, and the policy that it stands for at a budget."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from avlprof.allocators import Evidence, make_allocator, meet_budget, meet_read_budget, vision_share
from avlprof.policy import Policy, PromptShape, ScorerSpec


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
        shares = make_allocator(self.allocator, self.mix, self.temperature).shares(evidence, target)
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
