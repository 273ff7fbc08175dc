"""Between search and proof: who is generated for real on the search split, and what that teaches."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial
from scipy.stats import spearmanr

from avlprof.allocators import Evidence
from avlprof.errors import UserError
from avlprof.evaluation import AnswerStore
from avlprof.files import write_text
from avlprof.policy import Policy, PromptShape, parse_policy, sizes
from avlprof.tuning.candidate import Budget
from avlprof.tuning.prepared import Prepared
from avlprof.tuning.refine import is_refined, moves_heads
from avlprof.tuning.rivals import RANDOM, STATIC, UNIFORM, rivals, shipped_rivals, smaller_rivals
from avlprof.watch import SILENT, Part, Steps, Watch

Array = NDArray[np.float64]
FEW = 16
GENERATED_RIVALS = 3


@dataclass(frozen=True)
class ShortlistEntry:
    """A policy on the search split: the task's metric and the cheap score, `[n]` each, one a sample.

    `coverage` is the share of the traced vision attention that the policy's kept tokens could hold
    at best, mean over layers (NaN for a joint pool, where tokens compete with text, and for smaller
    pictures, whose tokens were not traced).
    """

    name: str
    policy: Policy
    metric: Array
    cheap: Array
    coverage: float
    trial: FrozenTrial | None = None

    @property
    def order(self) -> tuple[float, float]:
        """Lower is better: the metric decides, then the cheap score."""
        return -float(self.metric.mean()), float(self.cheap.mean())


@dataclass(frozen=True)
class Shortlist:
    """Everyone who was generated on the search split; `winner` and `strongest` are among them.

    `strongest` is the hand-set rival with the best metric; `left_out` says of other rivals why
    they could not take part, or their cheap score where that was too far behind to be generated.
    """

    entries: tuple[ShortlistEntry, ...]
    winner: ShortlistEntry
    strongest: ShortlistEntry
    dense: Array
    left_out: dict[str, str]

    def correlations(self) -> dict[str, tuple[float, int]]:
        """Spearman's rank correlation with the metric, and over how many policies, by cheap score.

        1 means that the cheap score orders the policies as their real answers do. NaN where all are
        equal, or less than three policies have the score.
        """
        scores = {
            "coverage": [entry.coverage for entry in self.entries],
            f"forced, {min(FEW, len(self.dense))} samples": [
                -entry.cheap[:FEW].mean() for entry in self.entries
            ],
            f"forced, {len(self.dense)} samples": [-entry.cheap.mean() for entry in self.entries],
        }
        metric = np.array([entry.metric.mean() for entry in self.entries])
        return {name: rank_correlation(np.array(values), metric) for name, values in scores.items()}

    def write(self, path: Path, metric: str, split: str) -> None:
        """What was learnt about the cheap scores, as JSON."""
        correlations = {
            name: {"spearman": None if np.isnan(rho) else round(rho, 4), "policies": count}
            for name, (rho, count) in self.correlations().items()
        }
        rows = [
            {
                "policy": entry.name,
                "trial": entry.trial.number if entry.trial else None,
                metric: round(float(entry.metric.mean()), 6),
                "forced": round(float(entry.cheap.mean()), 6),
                "coverage": None if np.isnan(entry.coverage) else round(entry.coverage, 6),
            }
            for entry in self.entries
        ]
        record = {
            "metric": metric,
            "split": split,
            "samples": len(self.dense),
            "rank_correlation": correlations,
            "policies": rows,
            "left_out": self.left_out,
        }
        write_text(path, json.dumps(record, indent=1) + "\n")


def rank_correlation(scores: Array, metric: Array) -> tuple[float, int]:
    """Spearman's coefficient over the policies that have a score, and how many these are."""
    known = np.isfinite(scores)
    count = int(known.sum())
    if count < 3 or np.ptp(scores[known]) == 0 or np.ptp(metric[known]) == 0:
        return float("nan"), count
    return float(spearmanr(scores[known], metric[known]).statistic), count


def make_shortlist(
    prepared: Prepared,
    best: Sequence[FrozenTrial],
    budget: Budget,
    store: AnswerStore,
    watch: Watch = SILENT,
) -> Shortlist:
    """Generate with the finalists; the metric decides, then the cheap score. Then with their rivals.

    Rivals are set at the winner's bytes and ranked by the cheap score; the best few of them, and
    `uniform`, `random`, `static core` and those with smaller pictures in any case, are generated to find
    the strongest.
    """
    answers = prepared.generated(store)
    steps = Steps(watch, "finalists", (len(best) + 2 + GENERATED_RIVALS) * len(prepared.samples))

    def entries(policies: Sequence[Policy], trials: Sequence[FrozenTrial | None]) -> list[ShortlistEntry]:
        metrics = answers.metrics(policies, steps.part())
        found = zip(policies, trials, metrics, prepared.cheap_scores(policies), strict=True)
        steps.add(len(policies) * len(prepared.samples))
        return [
            ShortlistEntry(
                name=policy.name if trial is None else name_of(trial),
                policy=policy,
                metric=metric,
                cheap=cheap,
                coverage=coverage_of(policy, prepared.evidence),
                trial=trial,
            )
            for policy, trial, metric, cheap in found
        ]

    finals = entries([parse_policy(t.user_attrs["policy"], name_of(t)) for t in best], best)
    winner = min(finals, key=lambda entry: entry.order)
    policies, left_out = _best_rivals(prepared, winner.policy, budget, watch)
    smaller, unfit = smaller_rivals(winner.policy, budget, prepared.pictures)
    left_out |= unfit
    if not policies:
        raise UserError("no baseline can be set at the bytes of the winner; raise the budget")
    rest = [*policies, *smaller]
    steps.total = (len(finals) + len(rest)) * len(prepared.samples)
    others = entries(rest, [None] * len(rest))
    strongest = min(others, key=lambda entry: entry.order)
    return Shortlist((*finals, *others), winner, strongest, prepared.dense_metric(store), left_out)


def _best_rivals(
    prepared: Prepared, winner: Policy, budget: Budget, watch: Watch
) -> tuple[list[Policy], dict[str, str]]:
    """The rivals to generate with, the best by the cheap score first, and who is not among them."""
    always = rivals(winner, budget, prepared.layers)
    more, left_out = shipped_rivals(winner, budget, prepared.evidence, always)
    with contextlib.suppress(UserError):  # of one of them; it is named below
        prepared.cheap_scores([*always, *more], Part(watch, "rivals"))
    ranked = []
    for policy in [*always, *more]:
        try:
            ranked.append((float(prepared.cheap(policy).mean()), policy))
        except UserError as error:
            left_out[policy.name] = str(error)
    ranked.sort(key=lambda pair: pair[0])
    policies = []
    for rank, (cheap, policy) in enumerate(ranked):
        if rank < GENERATED_RIVALS or policy.name in (UNIFORM, RANDOM, STATIC):
            policies.append(policy)
        else:
            left_out[policy.name] = f"forced score {cheap:.4f}, not among the best {GENERATED_RIVALS}"
    return policies, left_out


def name_of(trial: FrozenTrial) -> str:
    """`trial 12`, or `refined 12` for one that moves layers and `heads 12` for one that moves KV heads."""
    kind = "heads" if moves_heads(trial) else "refined" if is_refined(trial) else "trial"
    return f"{kind} {trial.number}"


def coverage_of(policy: Policy, evidence: Evidence) -> float:
    """Vision attention that a policy's kept tokens could hold at best, mean over governed layers; free."""
    if policy.joint is not None or policy.shrinks or evidence.coverage is None:
        return float("nan")
    prompt = PromptShape(0, evidence.tokens, 0, evidence.governed)
    counts = [size.vision for size in sizes(policy, prompt, evidence.layers)]
    curves = np.concatenate([np.zeros((evidence.layers, 1)), evidence.coverage], axis=1)
    return float(np.mean([curves[layer, counts[layer]] for layer in prompt.layers(evidence.layers)]))
