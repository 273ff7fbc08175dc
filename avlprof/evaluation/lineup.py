"""Which methods meet at which budgets, and which cannot, with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from avlprof.allocators.allocator import Evidence
from avlprof.errors import UserError
from avlprof.evaluation.at_budget import OverBudgetError, at_budget
from avlprof.policy import Policy, PromptShape
from avlprof.runtime.support import check_supported

Kind = Literal["baseline", "given", "tuned"]


@dataclass(frozen=True)
class Entry:
    """A method at a budget; `policy` is its policy scaled to it."""

    method: str
    kind: Kind
    budget: float
    policy: Policy


@dataclass(frozen=True)
class LeftOut:
    """A method that is not compared at a budget, why, and the least share that it can hold (or NaN)."""

    method: str
    kind: Kind
    budget: float
    reason: str
    floor: float


@dataclass(frozen=True)
class LineUp:
    """Everything that was asked for: what is compared, and what is left out."""

    entries: tuple[Entry, ...]
    left_out: tuple[LeftOut, ...]

    def at(self, budget: float, *kinds: Kind) -> list[Entry]:
        """Entries of a budget, of these kinds or of all."""
        return [e for e in self.entries if e.budget == budget and (not kinds or e.kind in kinds)]


def line_up(
    budgets: Sequence[float],
    prompts: Sequence[PromptShape],
    layers: int,
    *,
    baselines: Sequence[Policy],
    given: Sequence[Policy] = (),
    tuned: Sequence[Policy] = (),
    evidence: Callable[[], Evidence] | None = None,
) -> LineUp:
    """All methods at all budgets.

    Baselines and given policies are scaled to each budget (`at_budget`). A tuned policy stands at
    the budget that its provenance names, and at no other.

    Args:
        evidence: gives what the profile of a traced run knows; asked only when an allocator needs it.

    Raises:
        UserError: two methods share a name, or nothing can be compared at any budget.
    """
    methods: list[tuple[Kind, Policy]] = [
        *(("baseline", policy) for policy in baselines),
        *(("given", policy) for policy in given),
        *(("tuned", policy) for policy in tuned),
    ]
    _check_names(methods)
    known = evidence() if evidence and any(policy.allocator for _, policy in methods) else None
    entries: list[Entry] = []
    left_out: list[LeftOut] = []
    for budget in budgets:
        for kind, policy in methods:
            own = policy.provenance.budget if policy.provenance else None
            if kind == "tuned" and own is not None and not math.isclose(own, budget, abs_tol=1e-6):
                left_out.append(LeftOut(policy.name, kind, budget, f"was tuned at {own:g}", math.nan))
                continue
            try:
                scaled = at_budget(policy, budget, prompts, layers, known)
                check_supported(scaled)
            except UserError as error:
                floor = error.floor if isinstance(error, OverBudgetError) else math.nan
                left_out.append(LeftOut(policy.name, kind, budget, str(error), floor))
            else:
                entries.append(Entry(policy.name, kind, budget, scaled))
    if not entries:
        raise UserError(
            f"nothing can be compared: {left_out[0].reason}" if left_out else "no policy is given"
        )
    return LineUp(tuple(entries), tuple(left_out))


def _check_names(methods: Sequence[tuple[Kind, Policy]]) -> None:
    """A name is one line of the figure, so only policies tuned at different budgets may share it."""
    taken: set[tuple[str, float | None]] = set()
    for kind, policy in methods:
        budget = policy.provenance.budget if kind == "tuned" and policy.provenance else None
        if (policy.name, budget) in taken or (policy.name, None) in taken:
            raise UserError(f"two policies are named '{policy.name}'; change the field name of one")
        taken.add((policy.name, budget))
