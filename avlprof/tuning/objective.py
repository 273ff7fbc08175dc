"""What trials are scored by, and a trial's score; lower is better."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from avlprof.allocators import Evidence
from avlprof.errors import UserError
from avlprof.policy import Policy, dump_policy, live_share, read_share
from avlprof.registry import unknown
from avlprof.tuning.candidate import Budget

if TYPE_CHECKING:
    import optuna


class Point(Protocol):
    """A point of a search space."""

    def policy(self, evidence: Evidence, budget: Budget, name: str = "tuned") -> Policy:
        """The policy that it stands for, at the budget."""

    def params(self, budget: Budget) -> dict[str, Any]:
        """Its values as Optuna parameters."""


class Points(Protocol):
    """A search space; `Space` and `LayerSpace` are such."""

    def suggest(self, trial: optuna.Trial, budget: Budget) -> Point:
        """Ask a trial for a point."""

    def starts(self) -> Sequence[Point]:
        """The first trials, in their order."""


class Scores(Protocol):
    """Scores policies on the same samples, a batch at a time; `ForcedSet` and `Generated` are such."""

    @property
    def samples(self) -> Sequence[str]:
        """Ids, in the order of the scores."""

    def parts(self, policy: Policy) -> Iterator[Sequence[Any]]:
        """One score a sample, batch by batch."""

    def refreshed(self, policy: Policy) -> tuple[float, ...] | None:
        """The share of steps that refresh in each layer, where they are triggered; None: it is not known."""


OBJECTIVES: Mapping[str, Callable[[Any], float]] = MappingProxyType(
    {
        "fidelity": lambda score: float(score.kl),
        "likelihood": lambda score: -float(score.log_likelihood),
        "accuracy": lambda score: 1.0 - float(score.score),
    }
)
"""From one sample's score to a value that is lower when it is better."""

MEANING: Mapping[str, str] = MappingProxyType(
    {
        "fidelity": "KL to dense (nat per token)",
        "likelihood": "negative log-likelihood (nat per token)",
        "accuracy": "1 - task metric",
    }
)


def check_objective(name: str) -> None:
    """`UserError` unless the objective is known."""
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)


@dataclass(frozen=True)
class Objective:
    """Scores trials; lower is better.

    `kind` is a name of `OBJECTIVES`: `fidelity` and `likelihood` read forced scores (of the dense
    answers, of the references), `accuracy` judged answers. Values are reported per sample (the
    step is the sample's index), so a pruner can pair trials by sample. A trial that is stopped
    early returns its running mean and is marked incomplete.
    """

    scores: Scores
    evidence: Evidence
    budget: Budget
    space: Points
    kind: str = "fidelity"

    def policy(self, point: Point) -> tuple[Policy, tuple[float, ...] | None]:
        """The policy of a point at the budget, and how often it refreshes where that is triggered.

        Its first core is one that the most refreshes there can be leave room for. As often as that one
        refreshes on the samples, so often may a larger one: it is taken if its own refreshes fit too.
        """
        policy = point.policy(self.evidence, self.budget)
        rates = self.scores.refreshed(policy) if policy.triggered else None
        if rates is None:
            return policy, None
        tried = rates
        for _ in range(2):
            larger = point.policy(self.evidence, replace(self.budget, refreshed_steps=tried))
            own = self.scores.refreshed(larger) or rates
            prompts, steps = list(self.budget.prompts), self.budget.answer_tokens
            if read_share(larger, prompts, self.evidence.layers, steps, own) <= (self.budget.read or 1.0):
                return larger, own
            tried = tuple(max(a, b) for a, b in zip(tried, own, strict=True))
        return policy, rates

    def __call__(self, trial: optuna.Trial) -> float:
        candidate = self.space.suggest(trial, self.budget)
        policy, rates = self.policy(candidate)
        trial.set_user_attr("policy", dump_policy(policy))
        layers = policy.layers or 1
        prompts = list(self.budget.prompts)
        trial.set_user_attr("live_share", live_share(policy, prompts, layers))
        trial.set_user_attr(
            "read_share", read_share(policy, prompts, layers, self.budget.answer_tokens, rates)
        )
        value = OBJECTIVES[self.kind]
        seen: list[float] = []
        for part in self.scores.parts(policy):
            for score in part:
                trial.report(value(score), len(seen))
                seen.append(value(score))
            if len(seen) < len(self.scores.samples) and trial.should_prune():
                break
        trial.set_user_attr("samples", len(seen))
        trial.set_user_attr("complete", len(seen) == len(self.scores.samples))
        mean = float(np.mean(seen))
        if not np.isfinite(mean):
            raise UserError(
                f"trial {trial.number} has no finite {MEANING[self.kind]} ({mean}); try dtype float32"
            )
        return mean
