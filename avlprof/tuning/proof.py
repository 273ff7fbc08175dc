"""From trials to a policy that was proved on samples the search never saw."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence

from avlprof.evaluation import AnswerStore, Evaluation, PairedDifference, evaluate
from avlprof.policy import Policy, Provenance, Score, live_share, read_share
from avlprof.policy.provenance import Difference, Proof
from avlprof.tuning.candidate import Budget
from avlprof.tuning.playoff import PlayOff
from avlprof.tuning.prepared import Prepared
from avlprof.tuning.refine import is_refined
from avlprof.tuning.settings import Settings
from avlprof.tuning.verdict import Verdict
from avlprof.versions import __version__, versions


def prove(
    prepared: Prepared,
    winner: Policy,
    others: Sequence[Policy],
    settings: Settings,
    *,
    store: AnswerStore | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Generate on held-out samples: dense, the winner, and its rivals; random with three seeds."""
    return evaluate(
        prepared.loaded,
        prepared.task,
        [winner, *others],
        split=settings.proof_split,
        samples=settings.proof_samples,
        max_new_tokens=prepared.limit,
        batch_size=32,
        fidelity=False,
        latency=False,
        store=store,
        progress=progress,
    )


def with_provenance(
    prepared: Prepared,
    settings: Settings,
    budget: Budget,
    played: PlayOff,
    proof: Evaluation,
    found: Verdict,
    study: str,
) -> Policy:
    """The winner with where it comes from, how good it was measured to be, and the proof."""
    loaded, task, profile = prepared.loaded, prepared.task, prepared.profile
    winner, prompts = played.winner, list(budget.prompts)
    policy, layers = winner.policy, prepared.layers
    return policy.model_copy(
        update={
            "description": f"Tuned for {loaded.name} on {task.name} "
            f"at {settings.budget:.0%} of the dense prompt KV.",
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
                run=profile.meta.run,
                run_hash=profile.meta.run_hash,
                study=study,
                trial=winner.trial.number if winner.trial else None,
                refined=winner.trial is not None and is_refined(winner.trial),
                budget=settings.budget,
                read_budget=settings.read_budget,
                measured_budget=round(live_share(policy, prompts, layers), 6),
                measured_read_budget=round(read_share(policy, prompts, layers, budget.answer_tokens), 6),
                answer_tokens=budget.answer_tokens,
                metric=task.metric,
                scores=_scores(proof),
                dense_bytes=_mean(proof, "dense", "dense_bytes"),
                policy_bytes=_mean(proof, policy.name, "live_bytes"),
                objective=settings.objective,
                sampler=settings.sampler,
                proof=_proof(played, found, settings),
            ),
        }
    )


def _proof(played: PlayOff, found: Verdict, settings: Settings) -> Proof:
    correlation, policies = list(played.correlations().values())[-1]
    return Proof(
        split=settings.proof_split,
        samples=found.against_strongest.difference.samples,
        strongest=found.strongest,
        margin=found.margin,
        non_inferior=found.non_inferior,
        detectable=round(found.detectable, 6) if found.detectable is not None else None,
        differences={name: _difference(paired) for name, paired in found.differences.items()},
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
