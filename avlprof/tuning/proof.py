"""What held-out samples say: the winner against each rival, and against the strongest one."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from avlprof.errors import UserError, counted
from avlprof.evaluation import AnswerStore, Evaluation, PairedDifference, detectable_drop, paired_difference
from avlprof.evaluation.doubts import (
    Guess,
    best_guess,
    check_finite,
    dense_doubt,
    few_samples,
    samples_needed,
    tie_doubts,
)
from avlprof.evaluation.evaluate import EvaluationSettings, evaluate
from avlprof.policy import Policy, Provenance, Score, live_share, read_share
from avlprof.policy.provenance import Difference, Proof
from avlprof.tasks import Sample, Task
from avlprof.tuning.candidate import Budget
from avlprof.tuning.prepared import Prepared
from avlprof.tuning.refine import is_refined, moves_heads
from avlprof.tuning.settings import Settings
from avlprof.tuning.shortlist import Shortlist
from avlprof.versions import __version__, versions
from avlprof.watch import SILENT, Part, Watch

WORST_SD = 1.0
"""Standard deviation of a paired difference of scores in [0, 1] at its worst: half +1, half -1."""


@dataclass(frozen=True)
class Verdict:
    """The winner minus each rival on the same held-out samples, and the one test that was set before.

    `strongest` was chosen on the search split. The winner is `non_inferior` to it when the 95%
    interval of their difference lies above `-margin` and nothing is said in `doubts`, which
    names what keeps these samples from showing anything. Intervals are of a paired bootstrap,
    p-values of a two-sided sign-flip test, not adjusted for the number of rivals.
    """

    winner: str
    strongest: str
    margin: float
    differences: Mapping[str, PairedDifference]
    doubts: tuple[str, ...] = ()

    @property
    def against_strongest(self) -> PairedDifference:
        """The difference that decides."""
        return self.differences[self.strongest]

    @property
    def non_inferior(self) -> bool:
        """Whether the winner is shown (97.5% confidence) to lose at most the margin to the strongest."""
        return not self.doubts and self.against_strongest.difference.low > -self.margin

    @property
    def answer(self) -> str:
        """`yes`, `no` when it is shown to lose more, or `not shown` and why."""
        gap = self.against_strongest.difference
        if self.non_inferior:
            return "yes"
        if self.doubts:
            return f"not shown: {'; '.join(self.doubts)}"
        if gap.high < -self.margin:
            return "no"
        return f"not shown: the interval reaches below {-self.margin:g}"

    @property
    def detectable(self) -> float | None:
        """Smallest drop against the strongest rival that the samples could show; None for one sample."""
        paired = self.against_strongest
        return detectable_drop(paired.difference.samples, paired.sd) if math.isfinite(paired.sd) else None

    def sentences(self) -> list[str]:
        """One line a rival, and the answer on non-inferiority last."""
        lines = [
            f"{self.winner} - {rival}: {_interval(paired)}, p {paired.p_value:.3g}"
            for rival, paired in self.differences.items()
        ]
        lines.append(
            f"not inferior to {self.strongest}, the strongest on the search split, by more than "
            f"{self.margin:g}: {self.answer} ({_interval(self.against_strongest)})"
        )
        return lines


def verdict(
    proof: Evaluation, winner: str, strongest: str, margin: float, guess: Guess | None = None
) -> Verdict:
    """Compare the winner with every other row of a proof, sample by sample, means over seeds.

    Args:
        guess: what is scored on these samples without looking, which dense must exceed.

    Raises:
        UserError: a score is not finite, or the strongest rival has no row of its own.
    """
    scores = proof.answers["score"].to_numpy(dtype=float)
    check_finite(scores, str(proof.meta.get("metric", "")), list(proof.answers["sample"]))
    table = proof.answers.groupby(["policy", "sample"], sort=True)["score"].mean()
    ours = table[winner].to_numpy()
    names = [name for name in proof.answers["policy"].unique() if name != winner]
    differences = {name: paired_difference(ours, table[name].to_numpy()) for name in names}
    # several seeds are one row, named after their number
    label = next((name for name in names if name == strongest or name.startswith(f"{strongest} x")), None)
    if label is None:
        raise UserError(
            f"{strongest}, the strongest rival, has no row in the proof: "
            f"it is the same policy as {winner} or as the dense model"
        )
    doubts = [
        *([text] if "dense" in names and (text := dense_doubt(table["dense"].to_numpy(), guess)) else []),
        *([text] if (text := _same(proof, winner, label)) else []),
        *tie_doubts(differences[label], margin, table[label].to_numpy(), label),
    ]
    return Verdict(winner, label, margin, differences, tuple(doubts))


def _same(proof: Evaluation, winner: str, rival: str) -> str | None:
    """A sentence when the two do not only score alike but are alike."""
    table = proof.answers
    if {"policy_hash", "prediction"} <= set(table):
        ours, theirs = (table[table["policy"] == name].sort_values("sample") for name in (winner, rival))
        if set(ours["policy_hash"]) == set(theirs["policy_hash"]):
            return f"{rival} is the same policy as {winner}"
        if list(ours["prediction"]) == list(theirs["prediction"]):
            return f"{rival} gives the same answers as {winner}, word for word"
    return None


def dense_sentence(dense: NDArray[np.float64], task: Task, split: str, samples: Sequence[Sample]) -> str:
    """A loud line when the search split itself says that nothing can be shown; else empty."""
    if text := dense_doubt(dense, best_guess(task.metric, samples)):
        where = f"split '{split}', {len(dense)} samples"
        return f"WARNING: {text} ({where}): no policy can be judged by {task.metric}"
    if len(dense) > 1 and np.ptp(dense) == 0.0:
        return (
            f"WARNING: dense scores {dense[0]:.3f} on every one of the {len(dense)} samples of split "
            f"'{split}': {task.metric} tells policies apart only by what they lose"
        )
    return ""


def power_sentence(samples: int, margin: float, ours: ArrayLike, theirs: ArrayLike, who: str) -> str:
    """What so many held-out samples can show, judged by the paired differences on the search split."""
    differences = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    sd = float(differences.std(ddof=1)) if differences.size > 1 else 0.0
    known = sd > 0
    sd = sd if known else WORST_SD
    drop = detectable_drop(samples, sd)
    source = (
        f"sd {sd:.2f} of {who} on {counted(differences.size, 'search sample')}"
        if known
        else f"no search sample tells {who} apart, so this is the worst case"
    )
    sentence = (
        f"{counted(samples, 'held-out sample')} can show a drop of {drop:.3f} "
        f"(80% power, 5% two-sided; {source})"
    )
    needed = samples_needed(margin, sd)
    if needed > samples:
        sentence += f"; to show that a tie is within {margin:g} takes about {needed:,}"
    return sentence


def _interval(paired: PairedDifference) -> str:
    gap = paired.difference
    if few_samples(gap.samples):
        return f"{gap.mean:+.3f}, n = {gap.samples} is too small for an interval"
    return f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"


def prove(
    prepared: Prepared,
    winner: Policy,
    others: Sequence[Policy],
    settings: Settings,
    store: AnswerStore,
    watch: Watch = SILENT,
) -> Evaluation:
    """Generate on held-out samples: dense, the winner, and its rivals; random with three seeds."""
    return evaluate(
        prepared.loaded,
        prepared.task,
        [winner, *others],
        EvaluationSettings(
            split=settings.proof_split,
            samples=settings.proof_samples,
            max_new_tokens=prepared.limit,
            batch_size=settings.batch_size,
            fidelity=False,
            latency=False,
        ),
        store=store,
        watch=Part(watch, "proof"),
    )


def with_provenance(
    prepared: Prepared,
    settings: Settings,
    budget: Budget,
    shortlist: Shortlist,
    proof: Evaluation,
    verdict: Verdict,
    study: str,
) -> Policy:
    """The winner with where it comes from, how good it was measured to be, and the proof."""
    loaded, task = prepared.loaded, prepared.task
    winner, prompts = shortlist.winner, list(budget.prompts)
    policy, layers = winner.policy, prepared.layers
    return policy.model_copy(
        update={
            "description": f"Tuned for {loaded.name} on {task.name} "
            f"at {budget.memory:.0%} of the dense prompt KV.",
            "provenance": Provenance(
                made_by=f"avlprof tune {__version__}",
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                model=loaded.source,
                model_revision=loaded.revision or "",
                model_hash=loaded.revision or "",
                versions=versions(),
                task=task.name,
                samples=len(prompts),
                seed=settings.seed,
                run=prepared.run,
                run_hash=prepared.run_hash,
                study=study,
                trial=winner.trial.number if winner.trial else None,
                refined=winner.trial is not None and is_refined(winner.trial),
                refined_heads=winner.trial is not None and moves_heads(winner.trial),
                budget=budget.memory,
                read_budget=budget.read,
                measured_budget=round(live_share(policy, prompts, layers), 6),
                measured_read_budget=round(read_share(policy, prompts, layers, budget.answer_tokens), 6),
                governed=loaded.adapter.governed,
                answer_tokens=budget.answer_tokens,
                metric=task.metric,
                scores=_scores(proof),
                dense_bytes=_mean(proof, "dense", "dense_bytes"),
                policy_bytes=_mean(proof, policy.name, "live_bytes"),
                objective=settings.objective,
                sampler=settings.sampler,
                proof=_proof(shortlist, verdict, settings),
                notes=""
                if verdict.non_inferior
                else f"not inferior to {verdict.strongest} by more than {verdict.margin:g}: {verdict.answer}",
            ),
        }
    )


def _proof(shortlist: Shortlist, verdict: Verdict, settings: Settings) -> Proof:
    correlation, policies = list(shortlist.correlations().values())[-1]
    return Proof(
        split=settings.proof_split,
        samples=verdict.against_strongest.difference.samples,
        strongest=verdict.strongest,
        margin=verdict.margin,
        non_inferior=verdict.non_inferior,
        doubts=verdict.doubts,
        detectable=round(verdict.detectable, 6) if verdict.detectable is not None else None,
        differences={name: _difference(paired) for name, paired in verdict.differences.items()},
        rank_correlation=None if math.isnan(correlation) else round(correlation, 4),
        rank_policies=policies,
    )


def _difference(paired: PairedDifference) -> Difference:
    gap = paired.difference
    return Difference(
        mean=round(gap.mean, 6),
        low=round(gap.low, 6),
        high=round(gap.high, 6),
        p_value=round(paired.p_value, 6),
    )


def _scores(proof: Evaluation) -> dict[str, Score]:
    return {
        str(row["policy"]): Score(
            mean=round(float(row["score"]), 6),
            low=round(float(row["low"]), 6),
            high=round(float(row["high"]), 6),
            samples=int(row["samples"]),
        )
        for row in proof.summary().to_dict("records")
    }


def _mean(proof: Evaluation, policy: str, column: str) -> int:
    table = proof.answers
    return round(float(table.loc[table["policy"] == policy, column].mean()))
