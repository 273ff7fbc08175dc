"""Search for the best policy at a budget: probe, trials, shortlist, proof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
import pandas as pd
from optuna.trial import FrozenTrial

from avlprof.allocators import Evidence
from avlprof.analysis import Profile
from avlprof.evaluation import AnswerStore, Evaluation
from avlprof.evaluation.doubts import best_guess
from avlprof.evaluation.lineup import POOLED, RESIZED
from avlprof.files import replacing
from avlprof.locks import FolderLock
from avlprof.models import LoadedModel
from avlprof.policy import FULL, Policy, parse_policy, save_policy
from avlprof.tasks import Task
from avlprof.tuning.candidate import Budget, Candidate
from avlprof.tuning.evidence import probed, shared_evidence
from avlprof.tuning.importance import FILE as IMPORTANCES
from avlprof.tuning.importance import knob_effects, parameter_importances, with_head_effect
from avlprof.tuning.objective import Objective
from avlprof.tuning.prepared import Prepared, answer_store, check_same_model, prepare
from avlprof.tuning.proof import (
    Verdict,
    dense_sentence,
    power_sentence,
    prove,
    verdict,
    with_provenance,
)
from avlprof.tuning.refine import moves_heads, refine, refine_heads
from avlprof.tuning.rivals import rivals
from avlprof.tuning.settings import Settings, check_budget
from avlprof.tuning.shortlist import Shortlist, make_shortlist
from avlprof.tuning.storages._base import StudyStorage
from avlprof.tuning.study import as_begun, check_folder, claim_study, finalists, study_meta
from avlprof.tuning.workers import Workers, run_workers
from avlprof.watch import SILENT, Part, Watch


@dataclass(frozen=True)
class Tuned:
    """The outcome of a study: the winner with its provenance, where it is, and its proof.

    `refined` is the study of the second stage, layer by layer, and `headed` that of the third, head by
    head, if there were such; `shortlist` who was generated on the search split. `knobs` is what
    `knob_effects` gives, `importances` what `parameter_importances` does.
    """

    policy: Policy
    folder: Path
    study: optuna.Study
    refined: optuna.Study | None
    headed: optuna.Study | None
    shortlist: Shortlist
    proof: Evaluation
    verdict: Verdict
    knobs: pd.DataFrame
    importances: pd.DataFrame

    def history(self) -> pd.DataFrame:
        """Scored trials in order, stage by stage: `trial, value, state`, for the figure of trials.

        A trial that was stopped early is `PRUNED`; `trial` counts over all stages.
        """
        trials = [
            trial for study in _stages(self.study, self.refined, self.headed) for trial in _scored(study)
        ]
        states = ["COMPLETE" if t.user_attrs.get("complete") else "PRUNED" for t in trials]
        return pd.DataFrame(
            {"trial": range(len(trials)), "value": [t.value for t in trials], "state": states}
        )

    @property
    def second(self) -> int | None:
        """Where in `history` the second stage begins; None without one."""
        return len(_scored(self.study)) if self.refined else None

    @property
    def third(self) -> int | None:
        """The same of the third stage."""
        if self.headed is None:
            return None
        return sum(len(_scored(study)) for study in _stages(self.study, self.refined))

    def comparisons(self) -> list[str]:
        """The winner against each rival on the same held-out samples, in a sentence each."""
        return self.verdict.sentences()


@dataclass(frozen=True)
class Search:
    """A study whose trials are done, and who was generated on the search split.

    `candidate` are the best scalars, before any refinement: a start for a neighbouring budget.
    """

    prepared: Prepared
    settings: Settings
    budget: Budget
    folder: Path
    study: optuna.Study
    refined: optuna.Study | None
    headed: optuna.Study | None
    shortlist: Shortlist
    candidate: Candidate


def tune(
    loaded: LoadedModel,
    task: Task,
    profile: Profile,
    folder: Path,
    budget: float,
    settings: Settings | None = None,
    *,
    workers: Workers | None = None,
    watch: Watch = SILENT,
) -> Tuned:
    """Tune a policy for a model and task at fixed budgets, and prove it on held-out samples.

    The same call resumes: finished trials are kept, one that a killed process left is tried
    again. Trials are scored by the objective, by default the KL to the dense model's own answers in
    one forced forward; the best few are generated for real on the search split and judged by the
    task's metric; the best of them is compared with dense, with random and uniform, and with the
    rival that was strongest on the search split, at equal bytes on samples that the search never saw.

    Args:
        budget: prompt KV live after prefill over dense, in [0, 1].
        workers: who runs the trials and where they are kept; this process and a journal file by default.

    Raises:
        UserError: a budget is infeasible, the profile is of another model, no dense answer has
            a second token, or `folder` holds another study or is worked on by another process.
    """
    settings = as_begun(folder, settings or Settings())
    check_budget("budget", budget)
    check_same_model(loaded, profile)
    check_folder(folder, study_meta(loaded, task, profile.meta.run_hash, budget, settings))
    prepared = prepare(loaded, task, profile, settings, watch)
    return prove_winner(search(prepared, folder, budget, settings, workers=workers, watch=watch), watch)


def search(
    prepared: Prepared,
    folder: Path,
    memory: float,
    settings: Settings,
    *,
    starts: Sequence[Candidate] = (),
    probe: Path | None = None,
    workers: Workers | None = None,
    watch: Watch = SILENT,
) -> Search:
    """Run the trials of a study, and generate with the best and with their rivals; resumes.

    Args:
        memory: the memory budget, in [0, 1].
        starts: further first trials, taken over from a study of another budget.
        probe: file of the sensitivity probe, by default in the folder.

    Raises:
        UserError: as `tune`.
    """
    settings = as_begun(folder, settings)
    meta = study_meta(prepared.loaded, prepared.task, prepared.run_hash, memory, settings)
    check_folder(folder, meta)
    budget = prepared.budget(memory, settings.read_budget)
    allocators = settings.space.within(budget, prepared.layers).allocators
    workers = workers or Workers()
    storage = workers.open(folder)

    def measured() -> Evidence:
        if "sensitivity" not in allocators or prepared.evidence.damage is not None:
            return prepared.evidence
        bits = bool(settings.refining) and settings.space.bits != (FULL,)
        path = probe or folder / "probe.json"
        return probed(prepared.evidence, prepared.forced, path, watch, bits=bits)

    lock = FolderLock(folder)
    try:
        claim_study(storage, meta)
        prepared = prepared.with_evidence(shared_evidence(storage, measured))
        objective = prepared.objective(folder, settings.space, budget, starts)
        store = answer_store(folder)
        _say_power(prepared, settings, objective, store, watch)
        if missed := settings.missed(len(objective.space.starts())):
            watch.say(missed)
        study, refined = _run_stages(storage, settings, objective, workers, watch)
        headed = None
        if settings.refine_heads:
            part = Part(watch, "trials", settings.trials - settings.refine_heads, settings.trials)
            base = finalists(study, 1, *_stages(refined))[0]
            heads = prepared.loaded.adapter.kv_heads
            headed = refine_heads(folder, settings, objective, base, heads, part)
        best = finalists(study, settings.finalists, *_stages(refined, headed))
        shortlist = make_shortlist(prepared, best, budget, store, watch)
        shortlist.write(folder / "fidelity.json", prepared.task.metric, settings.split)
    finally:
        lock.release()
    start = Candidate.of(finalists(study, 1)[0].params)
    return Search(prepared, settings, budget, folder, study, refined, headed, shortlist, start)


def _run_stages(
    storage: StudyStorage, settings: Settings, objective: Objective, workers: Workers, watch: Watch
) -> tuple[optuna.Study, optuna.Study | None]:
    """The trials of scalars, by all workers, and those that refine the best of them, by this one."""
    scalar = settings.scalar
    study = run_workers(
        workers,
        storage,
        replace(settings, trials=scalar, refine=0, refine_heads=0),
        objective,
        Part(watch, "trials", total=settings.trials),
    )
    if not settings.refining:
        return study, None
    part = Part(watch, "trials", scalar, settings.trials)
    return study, refine(storage.folder, settings, objective, finalists(study, 1)[0], part)


def prove_winner(done: Search, watch: Watch = SILENT) -> Tuned:
    """Generate on held-out samples with the winner and its rivals, and write policy and proof."""
    prepared, settings, shortlist = done.prepared, done.settings, done.shortlist
    for name, (rho, count) in shortlist.correlations().items():
        watch.say(f"rank correlation of {name} with {prepared.task.metric}: {rho:+.2f} over {count} policies")
    winner, strongest = shortlist.winner, shortlist.strongest
    names = f"tuned - {strongest.name}"
    watch.say(power_sentence(settings.proof_samples, settings.margin, winner.metric, strongest.metric, names))
    others = rivals(winner.policy, done.budget, prepared.layers)
    others += [entry.policy for entry in shortlist.entries if entry.name in (POOLED, RESIZED)]
    if strongest.name not in {policy.name for policy in others}:
        others.append(strongest.policy)
    lock = FolderLock(done.folder)
    try:
        proof = prove(prepared, winner.policy, others, settings, answer_store(done.folder), watch)
        guess = best_guess(
            prepared.task.metric, prepared.task.samples(settings.proof_split, settings.proof_samples)
        )
        outcome = verdict(proof, winner.policy.name, strongest.name, settings.margin, guess)
        name = done.folder.resolve().name
        policy = with_provenance(prepared, settings, done.budget, shortlist, proof, outcome, name)
        knobs = knob_effects(done.candidate, prepared, done.budget, watch)
        if winner.trial is not None and moves_heads(winner.trial):
            before = finalists(done.study, 1, *_stages(done.refined))[0].user_attrs["policy"]
            knobs = with_head_effect(knobs, winner.policy, parse_policy(before, "the best trial"), prepared)
        importances = parameter_importances(done.study)
        for table, file in ((knobs, "knobs.csv"), (importances, IMPORTANCES)):
            with replacing(done.folder / file) as partial:
                table.to_csv(partial, index=False)
        proof.to_parquet(done.folder / "proof.parquet")
        proof.to_csv(done.folder / "proof.csv")
        save_policy(policy, done.folder / "policy.yaml")
    finally:
        lock.release()
    return Tuned(
        policy, done.folder, done.study, done.refined, done.headed, shortlist, proof, outcome, knobs,
        importances,
    )  # fmt: skip


def _stages(*studies: optuna.Study | None) -> list[optuna.Study]:
    return [study for study in studies if study is not None]


def _scored(study: optuna.Study) -> list[FrozenTrial]:
    return [trial for trial in study.get_trials(deepcopy=False) if trial.value is not None]


def _say_power(
    prepared: Prepared, settings: Settings, objective: Objective, store: AnswerStore, watch: Watch
) -> None:
    """Before anything is searched: what the proof will be able to show, from a first look at uniform."""
    uniform = objective.space.starts()[0].policy(prepared.evidence, objective.budget, "uniform")
    dense, plain = prepared.dense_metric(store), prepared.generated(store).metric(uniform)
    if loud := dense_sentence(dense, prepared.task, settings.split, prepared.samples):
        watch.say(loud)
    watch.say(power_sentence(settings.proof_samples, settings.margin, plain, dense, "uniform - dense"))
