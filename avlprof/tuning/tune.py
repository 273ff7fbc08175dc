"""Search for the best policy at a budget: probe, trials, finalists, proof."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from avlprof.allocators import Evidence
from avlprof.analysis import Profile
from avlprof.errors import UserError
from avlprof.evaluation import Evaluation, generate_answers, paired_difference
from avlprof.files import write_text
from avlprof.models import LoadedModel
from avlprof.policy import Policy, parse_policy, save_policy
from avlprof.runtime.forced import ForcedSet
from avlprof.tasks import Sample, Task
from avlprof.tuning.candidate import Budget, Space, feasible_refreshes
from avlprof.tuning.objective import Objective
from avlprof.tuning.probe import LEVELS, probe
from avlprof.tuning.proof import finalists, prove, with_provenance
from avlprof.tuning.storage import StudyMeta, claim_folder, give_up_running, open_study, quiet

Progress = Callable[[str, int, int], None]
BATCH = 32


@dataclass(frozen=True)
class Settings:
    """What to tune and how hard to try.

    `samples` are of the search split, `proof_samples` of the held-out one; `trials` counts all
    trials of the study, those of earlier calls included.
    """

    budget: float = 0.2
    read_budget: float | None = None
    trials: int = 50
    samples: int = 64
    proof_samples: int = 100
    finalists: int = 3
    seed: int = 0
    prune: bool = True
    split: str = "search"
    proof_split: str = "held-out"
    max_new_tokens: int | None = None


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
        UserError: a budget is infeasible, or `folder` holds another study.
    """
    settings, space = settings or Settings(), space or Space()
    tell = progress or (lambda phase, done, total: None)
    samples = task.samples(settings.split, settings.samples)
    limit = settings.max_new_tokens or task.max_new_tokens
    _check_same_model(loaded, profile)
    claim_folder(folder, _meta(loaded, task, profile, samples, settings, limit))
    forced = ForcedSet.prepare(
        loaded,
        samples,
        max_new_tokens=limit,
        batch_size=BATCH,
        progress=lambda d, t: tell("dense answers", d, t),
    )
    steps = max(round(forced.answer_tokens), 1)
    budget = Budget(settings.budget, settings.read_budget, tuple(forced.shapes), steps)
    evidence = profile.evidence()
    space = replace(space, refreshes=feasible_refreshes(evidence, budget, space.refreshes))
    evidence = _probed(evidence, forced, folder, lambda d, t: tell("probe", d, t))
    study = _search(settings, space, Objective(forced, evidence, budget, space), folder, tell, on_trial)
    best = finalists(study, settings.finalists)
    chosen, trial = _play_off(loaded, task, best, settings, limit, tell)
    proof = prove(
        loaded,
        task,
        chosen,
        budget,
        split=settings.proof_split,
        samples=settings.proof_samples,
        max_new_tokens=limit,
        progress=lambda d, t: tell("proof", d, t),
    )
    winner = with_provenance(chosen, trial, loaded, task, profile, settings, budget, proof, folder.name)
    save_policy(winner, folder / "policy.yaml")
    proof.to_parquet(folder / "proof.parquet")
    proof.to_csv(folder / "proof.csv")
    return Tuned(winner, folder, study, proof)


def _search(
    settings: Settings,
    space: Space,
    objective: Objective,
    folder: Path,
    tell: Progress,
    on_trial: Callable[[optuna.Study, FrozenTrial], None] | None,
) -> optuna.Study:
    with quiet():
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if settings.prune:
            pruner = optuna.pruners.WilcoxonPruner(p_threshold=0.05, n_startup_steps=8)
        sampler = optuna.samplers.TPESampler(seed=settings.seed, n_startup_trials=10)
        study = open_study(folder, sampler, pruner)
        give_up_running(study)
        for start in space.starts():
            study.enqueue_trial(start.params(objective.budget), skip_if_exists=True)

        def counted(current: optuna.Study, trial: FrozenTrial) -> None:
            tell("trials", finished_trials(current), settings.trials)
            if on_trial:
                on_trial(current, trial)
            if finished_trials(current) >= settings.trials:
                current.stop()

        tell("trials", finished_trials(study), settings.trials)
        if finished_trials(study) < settings.trials:
            study.optimize(objective, callbacks=[counted])
    return study


def finished_trials(study: optuna.Study) -> int:
    """Trials that have a value."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def _play_off(
    loaded: LoadedModel,
    task: Task,
    best: Sequence[FrozenTrial],
    settings: Settings,
    limit: int,
    tell: Progress,
) -> tuple[Policy, FrozenTrial]:
    """Generate with the finalists on the search split; the task's metric decides, then the KL."""
    samples = task.samples(settings.split, settings.samples)
    ranked = []
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
            progress=lambda d, t, i=index: tell("finalists", i * t + d, len(best) * t),  # type: ignore[misc]
        )
        mean = sum(answer.score for answer in answers) / len(answers)
        ranked.append((-mean, trial.value, trial.number, policy, trial))
    *_, policy, trial = min(ranked, key=lambda entry: entry[:3])
    return policy, trial


def _probed(
    evidence: Evidence, forced: ForcedSet, folder: Path, tell: Callable[[int, int], None]
) -> Evidence:
    """Evidence with damage curves; they are kept beside the study and measured once."""
    path = folder / "probe.json"
    if path.exists():
        damage = np.array(json.loads(path.read_text())["damage"])
    else:
        damage = probe(forced, evidence.layers, "instruction", tell)
        write_text(path, json.dumps({"levels": LEVELS, "damage": damage.tolist()}, indent=1) + "\n")
    return replace(evidence, damage=damage, damage_levels=np.array(LEVELS))


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
    limit: int,
) -> StudyMeta:
    ids = json.dumps([sample.id for sample in samples])
    return StudyMeta(
        model=loaded.source,
        model_hash=loaded.revision or "",
        task=task.name,
        split=settings.split,
        samples=len(samples),
        sample_hash=hashlib.sha256(ids.encode()).hexdigest()[:16],
        max_new_tokens=limit,
        budget=settings.budget,
        read_budget=settings.read_budget,
        seed=settings.seed,
        run_hash=profile.meta.run_hash,
    )
