"""What is measured on which model, and how large: every number that a run of the evidence can set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from avlprof import Settings, Space, UserError
from avlprof.analysis import Profile
from avlprof.evaluation.doubts import FEWEST

SHARES = (0.1, 0.2, 0.4)
"""Budgets: shares of the vision KV that stay after prefill; system and text stay whole beside it."""

CHOSEN = Space(
    allocators=("uniform", "pyramid", "coverage", "sensitivity"),
    scorers=("distinct:valued:instruction", "valued:instruction", "last_query"),
    bits=(16, 4, 2),
    text_bits=(16, 4),
)
"""A space of few starts, which leaves a short search some trials of its own."""


@dataclass(frozen=True)
class Plan:
    """A model, its task, and how many samples and trials each step takes.

    Attributes:
        traced: samples of the search split that are traced.
        heads: how many of them are traced head by head as well, which takes more room.
        samples: samples of the search split that trials are scored on.
        generated: held-out samples that winner and rivals answer for real.
        held_out: held-out samples on which all methods are scored against dense.
        trials, refine, finalists: of each search, as in `avlprof.Settings`.
        batch: samples that run together.
    """

    model: str
    task: str
    traced: int
    heads: int
    samples: int
    generated: int
    held_out: int
    trials: int
    refine: int
    finalists: int
    batch: int = 32
    space: Space = CHOSEN
    seed: int = 0

    def settings(self) -> Settings:
        """The searches of this plan."""
        return Settings(
            trials=self.trials,
            refine=self.refine,
            samples=self.samples,
            proof_samples=self.generated,
            finalists=self.finalists,
            batch_size=self.batch,
            space=self.space,
            seed=self.seed,
        )

    def sized(self, sizes: Mapping[str, int | None]) -> Plan:
        """The plan with the sizes that are given."""
        known: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
        return replace(self, **known)

    @property
    def few(self) -> str:
        """A sentence when held-out samples are too few for intervals; else empty."""
        return (
            f"Fewer than {FEWEST} samples: no interval here means anything." if self.held_out < FEWEST else ""
        )


SIZES = tuple(field.name for field in fields(Plan) if field.type == "int" and field.name != "seed")
"""Fields of a plan that the command line can set."""

QUICK = Plan("tiny", "shapes:describe,read,row", 64, 16, 64, 240, 240, 60, 20, 3, space=Space())
"""The embedded model: a trial takes a quarter of a second."""

LONG = "pages:describe,paragraph,read_fields,read_chart,read_table"
SLOW = Plan("small", LONG, 16, 6, 24, 20, 48, 36, 12, 1, batch=16)
"""576 vision tokens and 30 layers: a trial takes 6 to 20 s of one busy CPU thread, an answer 2 to 4."""

MROPE = Plan("tiny-mrope", QUICK.task, 48, 16, 48, 100, 120, 46, 12, 2, space=Space())
"""The other embedded model: as quick, with positions of three axes; sized for 20 minutes of one thread."""

PLANS: Mapping[str, Plan] = {plan.model: plan for plan in (QUICK, MROPE, SLOW)}


def plans(models: Sequence[str], sizes: Mapping[str, int | None]) -> list[Plan]:
    """A plan for each `model`, or `model=task`; a model that is not known takes the sizes of `tiny`.

    Raises:
        UserError: a model that is not known has no task.
    """
    chosen = []
    for text in models:
        name, _, task = text.partition("=")
        if name not in PLANS and not task:
            raise UserError(f"model '{name}' has no plan of its own; give its task: {name}=TASK")
        plan = PLANS.get(name, replace(QUICK, model=name))
        chosen.append(replace(plan, task=task or plan.task).sized(sizes))
    return chosen


def memory_budget(profile: Profile, share: float) -> float:
    """The budget of prompt KV at which `share` of the vision KV stays, on the traced prompts."""
    counts = profile["samples"][["system", "vision", "text"]].sum()
    fixed = float((counts["system"] + counts["text"]) / counts.sum())
    return round(fixed + share * (1.0 - fixed), 4)
