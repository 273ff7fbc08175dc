"""From trials to a policy that was proved on samples the search never saw."""

from __future__ import annotations

import datetime
from collections.abc import Callable

import optuna
from optuna.trial import FrozenTrial, TrialState

import avlprof
from avlprof.analysis import Profile
from avlprof.errors import UserError
from avlprof.evaluation import AnswerStore, Evaluation, equal_bytes, evaluate
from avlprof.models import LoadedModel
from avlprof.policy import Policy, Provenance, Score, ScorerSpec, live_share, read_share
from avlprof.tasks import Task
from avlprof.tuning.candidate import Budget
from avlprof.tuning.settings import Settings
from avlprof.versions import versions

PLAIN_SCORER = "last_query"


def finalists(study: optuna.Study, count: int) -> list[FrozenTrial]:
    """The best `count` fully scored trials with different policies, best first."""
    trials = [
        trial
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if trial.user_attrs.get("complete") and trial.value is not None
    ]
    if not trials:
        raise UserError("the study has no finished trial; run 'avlprof tune' again with more --trials")
    best: dict[str, FrozenTrial] = {}
    for trial in sorted(trials, key=lambda t: (t.value, t.number)):
        best.setdefault(trial.user_attrs["policy"], trial)
    return list(best.values())[:count]


def rivals(winner: Policy, budget: Budget, layers: int) -> list[Policy]:
    """Baselines at the winner's live and read bytes, without those that do what the winner does.

    `uniform` with A-VL's own scorer (`last_query`, one set a layer), `uniform, same scorer` with
    the winner's, and `random`.
    """
    prompts, steps = budget.prompts, budget.answer_tokens
    plain = winner.model_copy(update={"scorer": ScorerSpec(name=PLAIN_SCORER), "heads": "shared"})
    uniform, same = (
        next((p for p in equal_bytes(policy, prompts, layers, steps) if p.name == "uniform"), policy)
        for policy in (plain, winner)
    )
    random = [p for p in equal_bytes(winner, prompts, layers, steps) if p.name == "random"]
    named = [("uniform", uniform), ("uniform, same scorer", same), *(("random", p) for p in random)]
    hashes = {winner.hash}
    found = []
    for name, policy in named:
        if policy.hash not in hashes:
            hashes.add(policy.hash)
            found.append(policy.model_copy(update={"name": name}))
    return found


def prove(
    loaded: LoadedModel,
    task: Task,
    winner: Policy,
    budget: Budget,
    *,
    split: str,
    samples: int,
    max_new_tokens: int,
    store: AnswerStore | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Generate on held-out samples: dense, the winner, and its `rivals`; random with three seeds."""
    policies = [winner, *rivals(winner, budget, loaded.adapter.layers)]
    return evaluate(
        loaded,
        task,
        policies,
        split=split,
        samples=samples,
        max_new_tokens=max_new_tokens,
        batch_size=32,
        fidelity=False,
        latency=False,
        store=store,
        progress=progress,
    )


def with_provenance(
    policy: Policy,
    trial: FrozenTrial,
    loaded: LoadedModel,
    task: Task,
    profile: Profile,
    settings: Settings,
    budget: Budget,
    proof: Evaluation,
    study: str,
) -> Policy:
    """The winner with where it comes from and how good it was measured to be."""
    layers = loaded.adapter.layers
    prompts = list(budget.prompts)
    summary = proof.summary()
    scores = {
        str(row["policy"]): Score(
            mean=round(float(row["score"]), 6),
            low=round(float(row["low"]), 6),
            high=round(float(row["high"]), 6),
            samples=int(row["samples"]),
        )
        for row in summary.to_dict("records")
    }
    return policy.model_copy(
        update={
            "description": f"Tuned for {loaded.name} on {task.name} "
            f"at {settings.budget:.0%} of the dense prompt KV.",
            "provenance": Provenance(
                made_by=f"avlprof tune {avlprof.__version__}",
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
                trial=trial.number,
                budget=settings.budget,
                read_budget=settings.read_budget,
                measured_budget=round(live_share(policy, prompts, layers), 6),
                measured_read_budget=round(read_share(policy, prompts, layers, budget.answer_tokens), 6),
                answer_tokens=budget.answer_tokens,
                metric=task.metric,
                scores=scores,
                dense_bytes=_mean(proof, "dense", "dense_bytes"),
                policy_bytes=_mean(proof, policy.name, "live_bytes"),
            ),
        }
    )


def _mean(proof: Evaluation, policy: str, column: str) -> int:
    table = proof.answers
    return round(float(table.loc[table["policy"] == policy, column].mean()))
