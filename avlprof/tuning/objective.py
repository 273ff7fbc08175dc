"""What trials are scored by, and a trial's score; lower is better."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from avlprof.allocators import Evidence
from avlprof.errors import UserError
from avlprof.policy import Policy, dump_policy, live_share, read_share
from avlprof.registry import unknown
from avlprof.tuning.candidate import Budget
from avlprof.tuning.storages._base import origin

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


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

    def batches(self) -> Iterator[Callable[[Sequence[Policy]], Sequence[Sequence[Any]]]]:
        """For each batch of samples what scores policies on it, `[policy][sample]`."""

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


@dataclass(eq=False)
class _Scored:
    """A trial that is being scored, and its value on each sample that its policy was scored on."""

    trial: optuna.Trial
    origin: int
    policy: Policy
    values: list[float] = field(default_factory=list)
    reported: int = 0

    def report(self, end: int) -> None:
        """Tell the study the values of all samples before `end`."""
        for step in range(self.reported, end):
            self.trial.report(self.values[step], step)
        self.reported = end


@dataclass(frozen=True)
class Objective:
    """Scores trials; lower is better.

    `kind` is a name of `OBJECTIVES`: `fidelity` and `likelihood` read forced scores (of the dense
    answers, of the references), `accuracy` judged answers. Values are reported per sample (the
    step is the sample's index), so a pruner can pair trials by sample. A trial that is stopped
    early has the mean of what it saw for its value, and is marked incomplete.
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
        read = self.budget.read
        rates = self.scores.refreshed(policy) if policy.triggered and read is not None else None
        if read is None or rates is None:
            return policy, None
        tried = rates
        for _ in range(2):
            larger = point.policy(self.evidence, replace(self.budget, refreshed_steps=tried))
            own = self.scores.refreshed(larger) or rates
            prompts, steps = list(self.budget.prompts), self.budget.answer_tokens
            if read_share(larger, prompts, self.evidence.layers, steps, own) <= read:
                return larger, own
            tried = tuple(max(a, b) for a, b in zip(tried, own, strict=True))
        return policy, rates

    def suggest(self, trial: optuna.Trial) -> Point:
        """Ask a trial for a point of the space."""
        return self.space.suggest(trial, self.budget)

    def score(
        self,
        batch: Sequence[tuple[optuna.Trial, Point]],
        halve: bool = False,
        before: Sequence[FrozenTrial] = (),
    ) -> Iterator[tuple[optuna.Trial, float]]:
        """Score trials together, in as few passes as their policies allow; gives each as it is done.

        Trials stop where the study's pruner says so at the end of a batch of samples, or by rank:
        after each of the `rungs` the better half goes on, rounded up, by the mean of the values so far.

        Args:
            halve: whether trials stop by rank; where batches of samples end decides nothing then.
            before: finished trials of the same batch, which take part in the ranks.

        Raises:
            UserError: a trial's value is not finite.
        """
        running = [_Scored(trial, _origin(trial), self._noted(trial, point)) for trial, point in batch]
        total, seen, value = len(self.scores.samples), 0, OBJECTIVES[self.kind]
        ends = rungs(total) if halve else ()
        for score in self.scores.batches():
            found = score([one.policy for one in running])
            for one, part in zip(running, found, strict=True):
                one.values.extend(map(value, part))
            first, seen = seen, seen + len(found[0])
            for end in (*(rung for rung in ends if first < rung < seen), seen):
                for one in running:
                    one.report(end)
                stopped = _stopped(running, before, end, end in ends) if end < total else running
                yield from [(one.trial, self._value(one)) for one in stopped]
                running = [one for one in running if one not in stopped]
            if not running:
                return

    def _noted(self, trial: optuna.Trial, point: Point) -> Policy:
        """The policy of a trial, which notes it and its shares."""
        policy, rates = self.policy(point)
        trial.set_user_attr("policy", dump_policy(policy))
        layers, prompts = policy.layers or 1, list(self.budget.prompts)
        trial.set_user_attr("live_share", live_share(policy, prompts, layers))
        trial.set_user_attr(
            "read_share", read_share(policy, prompts, layers, self.budget.answer_tokens, rates)
        )
        return policy

    def _value(self, one: _Scored) -> float:
        """A trial's value from all that it reported."""
        trial, seen = one.trial, one.reported
        trial.set_user_attr("samples", seen)
        trial.set_user_attr("complete", seen == len(self.scores.samples))
        mean = float(np.mean(one.values[:seen]))
        if not np.isfinite(mean):
            raise UserError(
                f"trial {trial.number} has no finite {MEANING[self.kind]} ({mean}); try dtype float32"
            )
        return mean


def _origin(trial: optuna.Trial) -> int:
    return origin(trial.study.get_trials(deepcopy=False)[trial.number])


def _stopped(
    running: Sequence[_Scored], before: Sequence[FrozenTrial], end: int, halve: bool
) -> list[_Scored]:
    """Those of the running trials that stop after `end` samples."""
    if not halve:
        return [one for one in running if one.trial.should_prune()]
    means = {one.origin: float(np.mean(one.values[:end])) for one in running}
    for trial in before:
        values = [trial.intermediate_values[step] for step in range(end) if step in trial.intermediate_values]
        if len(values) == end:
            means[origin(trial)] = float(np.mean(values))
    stay = better_half(means)
    return [one for one in running if one.origin not in stay]


def rungs(samples: int) -> tuple[int, ...]:
    """After how many of the samples the worse half of trials that are scored together stops."""
    return tuple(sorted({-(-samples // parts) for parts in (4, 2)} - {samples}))


def better_half(means: Mapping[int, float]) -> set[int]:
    """Of trials, by number, those with the lower means: half, rounded up; the first of equal ones.

    Source: successive halving, Jamieson and Talwalkar 2016 (arXiv 1502.07943).
    """
    ranked = sorted(means, key=lambda number: (not np.isfinite(means[number]), means[number], number))
    return set(ranked[: -(-len(ranked) // 2)])
