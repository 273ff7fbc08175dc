"""Search for the best policy at a budget: probe, trials, finalists, proof."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from avlprof.analysis import Profile
from avlprof.errors import UserError
from avlprof.evaluation import AnswerStore, Evaluation, generate_answers, paired_difference
from avlprof.models import LoadedModel
from avlprof.policy import Policy, parse_policy, save_policy
from avlprof.runs.lock import FolderLock
from avlprof.runtime.forced import ForcedSet
from avlprof.tasks import Sample, Task
from avlprof.tuning.candidate import Budget
from avlprof.tuning.objective import Objective
from avlprof.tuning.probe import probed
from avlprof.tuning.proof import finalists, prove, with_provenance
from avlprof.tuning.settings import Settings
from avlprof.tuning.space import Space
from avlprof.tuning.storage import StudyMeta, check_folder, claim_folder
from avlprof.tuning.trials import run_trials

Progress = Callable[[str, int, int], None]
BATCH = 32


@dataclass(frozen=True)
class Tuned:
    """The outcome of a study: the winner with its provenance, where it is, and its proof."""

    policy: Policy
    folder: Path
    study: optuna.Study
    proof: Evaluation

    def comparisons(self) -> list[str]:
        """The winner against each rival on the same held-out samples, in a sentence each."""
        table = self.proof.answers.groupby(["policy", "sample"], sort=True)["score"].mean()
        ours = table[self.policy.name].to_numpy()
        lines = []
        for rival in self.proof.answers["policy"].unique():
            if rival != self.policy.name:
                paired = paired_difference(ours, table[rival].to_numpy())
                gap = paired.difference
                lines.append(
                    f"{self.policy.name} - {rival}: {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], "
                    f"p {paired.p_value:.3g}"
                )
        return lines


def tune(
    loaded: LoadedModel,
    task: Task,
    profile: Profile,
    folder: Path,
    settings: Settings | None = None,
    *,
    space: Space | None = None,
    progress: Progress | None = None,
    on_trial: Callable[[optuna.Study, FrozenTrial], None] | None = None,
) -> Tuned:
    """Tune a policy for a model and task at fixed budgets, and prove it on held-out samples.

    The same call resumes: finished trials are kept, one that a killed process left is tried
    again. Trials score the KL to the dense model's own answers by one forced forward; the best
    few are generated for real on the search split and judged by the task's metric; the best of
    them is compared with dense, uniform and random at equal bytes on samples that the search
    never saw.

    Args:
        progress: called with the name of a phase, units done and units in all.
        on_trial: called with study and trial after each trial.

    Raises:
        UserError: a budget is infeasible, the profile is of another model, no dense answer has
            a second token, or `folder` holds another study or is worked on by another process.
    """
    settings, space = settings or Settings(), space or Space()
    tell = progress or (lambda phase, done, total: None)
    samples = task.samples(settings.split, settings.samples)
    limit = settings.max_new_tokens or task.max_new_tokens
    _check_same_model(loaded, profile)
    meta = _meta(loaded, task, profile, samples, settings, space, limit)
    check_folder(folder, meta)
    forced = ForcedSet.prepare(
        loaded,
        samples,
        max_new_tokens=limit,
        batch_size=BATCH,
        progress=lambda d, t: tell("dense answers", d, t),
    )
    budget = _budget(settings, forced)
    evidence = profile.evidence()
    space = space.within(budget, evidence.layers)
    lock = FolderLock(folder)
    try:
        claim_folder(folder, meta)
        if "sensitivity" in space.allocators:
            evidence = probed(evidence, forced, folder / "probe.json", lambda d, t: tell("probe", d, t))
        objective = Objective(forced, evidence, budget, space)
        study = run_trials(
            folder,
            settings,
            space,
            objective,
            progress=lambda d, t: tell("trials", d, t),
            on_trial=on_trial,
        )
        store = AnswerStore(folder / "answers")
        best = finalists(study, settings.finalists)
        chosen, trial = _play_off(loaded, task, best, samples, forced, limit, store, tell)
        proof = prove(
            loaded,
            task,
            chosen,
            budget,
            split=settings.proof_split,
            samples=settings.proof_samples,
            max_new_tokens=limit,
            store=store,
            progress=lambda d, t: tell("proof", d, t),
        )
        name = folder.resolve().name
        winner = with_provenance(chosen, trial, loaded, task, profile, settings, budget, proof, name)
        proof.to_parquet(folder / "proof.parquet")
        proof.to_csv(folder / "proof.csv")
        save_policy(winner, folder / "policy.yaml")
    finally:
        lock.release()
    return Tuned(winner, folder, study, proof)


def _budget(settings: Settings, forced: ForcedSet) -> Budget:
    """The budget, counted on the prompts and answers that trials are scored on."""
    if not forced.answer_tokens:
        raise UserError(
            "every dense answer ends at its first token, which no policy changes; "
            "choose a task with longer answers"
        )
    steps = max(round(forced.answer_tokens), 1)
    return Budget(settings.budget, settings.read_budget, tuple(forced.shapes), steps)


def _play_off(
    loaded: LoadedModel,
    task: Task,
    best: Sequence[FrozenTrial],
    samples: Sequence[Sample],
    forced: ForcedSet,
    limit: int,
    store: AnswerStore,
    tell: Progress,
) -> tuple[Policy, FrozenTrial]:
    """Generate with the finalists on the searched samples; the task's metric decides, then the KL."""
    ranked = []
    lengths = {name: shape.total for name, shape in zip(forced.samples, forced.shapes, strict=True)}
    tell("finalists", 0, len(best) * len(samples))
    for index, trial in enumerate(best):
        policy = parse_policy(trial.user_attrs["policy"], f"trial {trial.number}")
        answers = generate_answers(
            loaded,
            samples,
            policy,
            max_new_tokens=limit,
            batch_size=BATCH,
            metric=task.metric,
            lengths=lengths,
            store=store,
            progress=lambda d, t, i=index: tell("finalists", i * t + d, len(best) * t),  # type: ignore[misc]
        )
        mean = sum(answer.score for answer in answers) / len(answers)
        ranked.append((-mean, trial.value, trial.number, policy, trial))
    *_, policy, trial = min(ranked, key=lambda entry: entry[:3])
    return policy, trial


def _check_same_model(loaded: LoadedModel, profile: Profile) -> None:
    traced = profile.meta.settings.model_hash
    if traced and loaded.revision and traced != loaded.revision:
        raise UserError(
            f"the run was traced with another model ({profile.meta.settings.model} {traced}), "
            f"not with {loaded.source} {loaded.revision}; trace this model first"
        )


def _meta(
    loaded: LoadedModel,
    task: Task,
    profile: Profile,
    samples: Sequence[Sample],
    settings: Settings,
    space: Space,
    limit: int,
) -> StudyMeta:
    asked = json.dumps([[sample.id, sample.prompt] for sample in samples])
    return StudyMeta(
        model=loaded.source,
        model_hash=loaded.revision or "",
        task=task.name,
        split=settings.split,
        samples=len(samples),
        sample_hash=hashlib.sha256(asked.encode()).hexdigest()[:16],
        max_new_tokens=limit,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        budget=settings.budget,
        read_budget=settings.read_budget,
        seed=settings.seed,
        run_hash=profile.meta.run_hash,
        space=space.described(),
    )
