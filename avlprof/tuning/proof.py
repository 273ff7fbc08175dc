"""What held-out samples say: the winner against each rival, and against the strongest one."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from avlprof.errors import counted
from avlprof.evaluation import AnswerStore, Evaluation, PairedDifference, detectable_drop, paired_difference
from avlprof.evaluation.evaluate import EvaluationSettings, evaluate
from avlprof.policy import Policy, Provenance, Score, live_share, read_share
from avlprof.policy.provenance import Difference, Proof
from avlprof.tuning.candidate import Budget
from avlprof.tuning.prepared import Prepared
from avlprof.tuning.refine import is_refined
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
    interval of their difference lies above `-margin`. Intervals are of a paired bootstrap,
    p-values of a two-sided sign-flip test, not adjusted for the number of rivals.
    """

    winner: str
    strongest: str
    margin: float
    differences: Mapping[str, PairedDifference]

    @property
    def against_strongest(self) -> PairedDifference:
        """The difference that decides."""
        return self.differences[self.strongest]

    @property
    def non_inferior(self) -> bool:
        """Whether the winner loses at most the margin to the strongest rival, with 97.5% confidence."""
        return self.against_strongest.difference.low > -self.margin

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
        answer = "yes" if self.non_inferior else "no"
        lines.append(
            f"not inferior to {self.strongest}, the strongest on the search split, by more than "
            f"{self.margin:g}: {answer} ({_interval(self.against_strongest)})"
        )
        return lines


def verdict(proof: Evaluation, winner: str, strongest: str, margin: float) -> Verdict:
    """Compare the winner with every other row of a proof, sample by sample, means over seeds."""
    table = proof.answers.groupby(["policy", "sample"], sort=True)["score"].mean()
    ours = table[winner].to_numpy()
    names = [name for name in proof.answers["policy"].unique() if name != winner]
    differences = {name: paired_difference(ours, table[name].to_numpy()) for name in names}
    # several seeds are one row, named after their number
    label = next(name for name in names if name == strongest or name.startswith(f"{strongest} x"))
    return Verdict(winner, label, margin, differences)


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


def samples_needed(margin: float, sd: float, power: float = 0.8) -> int:
    """Samples with which a policy that is just as good is shown not to be inferior, mostly.

    `((z(0.975) + z(power)) * sd / margin)^2`, the inverse of `detectable_drop`.
    """
    normal = NormalDist()
    return math.ceil(((normal.inv_cdf(0.975) + normal.inv_cdf(power)) * sd / margin) ** 2)


def _interval(paired: PairedDifference) -> str:
    gap = paired.difference
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
                budget=budget.memory,
                read_budget=budget.read,
                measured_budget=round(live_share(policy, prompts, layers), 6),
                measured_read_budget=round(read_share(policy, prompts, layers, budget.answer_tokens), 6),
                answer_tokens=budget.answer_tokens,
                metric=task.metric,
                scores=_scores(proof),
                dense_bytes=_mean(proof, "dense", "dense_bytes"),
                policy_bytes=_mean(proof, policy.name, "live_bytes"),
                objective=settings.objective,
                sampler=settings.sampler,
                proof=_proof(shortlist, verdict, settings),
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
