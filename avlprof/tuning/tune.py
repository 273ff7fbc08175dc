"""Search for the best policy at a budget: probe, trials, finalists, proof."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
import pandas as pd
from optuna.trial import FrozenTrial

from avlprof.allocators import Evidence
from avlprof.analysis import Profile
from avlprof.evaluation import AnswerStore, Evaluation
from avlprof.files import replacing
from avlprof.locks import FolderLock
from avlprof.models import LoadedModel
from avlprof.policy import Policy, save_policy
from avlprof.tasks import Task
from avlprof.tuning.candidate import Budget, Candidate, noted_starts
from avlprof.tuning.evidence import shared_evidence
from avlprof.tuning.importance import FILE as IMPORTANCES
from avlprof.tuning.importance import knob_effects, parameter_importances
from avlprof.tuning.objective import Objective
from avlprof.tuning.prepared import Prepared, Progress, check_same_model
from avlprof.tuning.proof import Verdict, power_sentence, prove, verdict, with_provenance
from avlprof.tuning.refine import refine
from avlprof.tuning.rivals import rivals
from avlprof.tuning.settings import Settings
from avlprof.tuning.shortlist import PlayOff, play_off
from avlprof.tuning.space import Space
from avlprof.tuning.study import check_folder, claim_study, finalists, study_meta
from avlprof.tuning.workers import Crew
from avlprof.watch import Watch

OnTrial = Callable[[optuna.Study, FrozenTrial], None]
Told = Callable[[str], None]


@dataclass(frozen=True)
class Tuned:
    """The outcome of a study: the winner with its provenance, where it is, and its proof.

    `refined` is the study of the second stage, if there was one. `knobs` is what `knob_effects` gives,
    `importances` what `parameter_importances` does.
    """

    policy: Policy
    folder: Path
    study: optuna.Study
    refined: optuna.Study | None
    played: PlayOff
    proof: Evaluation
    verdict: Verdict
    knobs: pd.DataFrame
    importances: pd.DataFrame

    def history(self) -> pd.DataFrame:
        """Scored trials in order, the second stage last: `trial, value, state`, for the figure of trials.

        A trial that was stopped early is `PRUNED`; `trial` counts over both stages.
        """
        studies = (self.study, self.refined) if self.refined else (self.study,)
        trials = [t for study in studies for t in study.get_trials(deepcopy=False) if t.value is not None]
        states = ["COMPLETE" if t.user_attrs.get("complete") else "PRUNED" for t in trials]
        return pd.DataFrame(
            {"trial": range(len(trials)), "value": [t.value for t in trials], "state": states}
        )

    @property
    def second(self) -> int | None:
        """Where in `history` the second stage begins; None without one."""
        scored = [trial for trial in self.study.get_trials(deepcopy=False) if trial.value is not None]
        return len(scored) if self.refined else None

    def comparisons(self) -> list[str]:
        """The winner against each rival on the same held-out samples, in a sentence each."""
        return self.verdict.sentences()


@dataclass(frozen=True)
class Search:
    """A study whose trials are done: who was generated on the search split, and who won there.

    `candidate` are the best scalars, before any refinement: a start for a neighbouring budget.
    """

    prepared: Prepared
    settings: Settings
    budget: Budget
    folder: Path
    study: optuna.Study
    refined: optuna.Study | None
    played: PlayOff
    candidate: Candidate


def tune(
    loaded: LoadedModel,
    task: Task,
    profile: Profile,
    folder: Path,
    settings: Settings | None = None,
    *,
    space: Space | None = None,
    progress: Progress | None = None,
    on_trial: OnTrial | None = None,
    told: Told | None = None,
    crew: Crew | None = None,
) -> Tuned:
    """Tune a policy for a model and task at fixed budgets, and prove it on held-out samples.

    The same call resumes: finished trials are kept, one that a killed process left is tried
    again. Trials are scored by the objective, by default the KL to the dense model's own answers in
    one forced forward; the best few are generated for real on the search split and judged by the
    task's metric; the best of them is compared with dense, with random and uniform, and with the
    rival that was strongest on the search split, at equal bytes on samples that the search never saw.

    Args:
        progress: called with the name of a phase, units done and units in all.
        on_trial: called with study and trial after each trial.
        told: called with sentences for the reader, such as what the proof will be able to show.
        crew: who runs the trials and where they are kept; this process and a journal file by default.

    Raises:
        UserError: a budget is infeasible, the profile is of another model, no dense answer has
            a second token, or `folder` holds another study or is worked on by another process.
    """
    settings, space = settings or Settings(), space or Space()
    check_same_model(loaded, profile)
    check_folder(folder, study_meta(loaded, task, profile, settings, space))
    prepared = Prepared.make(loaded, task, profile, settings, space.scorers, progress)
    found = search(
        prepared, folder, settings, space, progress=progress, on_trial=on_trial, told=told, crew=crew
    )
    return prove_winner(found, progress=progress, told=told)


def search(
    prepared: Prepared,
    folder: Path,
    settings: Settings,
    space: Space,
    *,
    warm: Sequence[Candidate] = (),
    probe: Path | None = None,
    progress: Progress | None = None,
    on_trial: OnTrial | None = None,
    told: Told | None = None,
    crew: Crew | None = None,
) -> Search:
    """Run the trials of a study, and generate with the best and with their rivals; resumes.

    Args:
        warm: further first trials, taken over from a study of another budget.
        probe: file of the sensitivity probe, by default in the folder.

    Raises:
        UserError: as `tune`.
    """
    tell, say = progress or (lambda phase, done, total: None), told or (lambda sentence: None)
    meta = study_meta(prepared.loaded, prepared.task, prepared.profile, settings, space)
    check_folder(folder, meta)
    budget = prepared.budget(settings)
    space = space.within(budget, prepared.layers)
    crew = crew or Crew()
    place = crew.place(folder)

    def evidence() -> Evidence:
        if "sensitivity" in space.allocators:
            prepared.probe(probe or folder / "probe.json", progress)
        return prepared.evidence

    lock = FolderLock(folder)
    try:
        claim_study(place, meta)
        prepared.evidence = shared_evidence(place, evidence)
        space = replace(space.supported(prepared.evidence), warm=noted_starts(folder, warm))
        store = AnswerStore(folder / "answers")
        _say_power(prepared, settings, space, budget, store, say)
        if missed := settings.missed(len(space.starts())):
            say(missed)
        scalar = settings.trials - settings.refining
        objective = Objective(prepared.scores(store), prepared.evidence, budget, space, settings.objective)
        study = crew.run(
            place,
            replace(settings, trials=scalar, refine=0),
            space,
            objective,
            progress=lambda d, t: tell("trials", d, settings.trials),
            on_trial=on_trial,
        )
        refined = None
        if settings.refining:
            refined = refine(
                folder,
                settings,
                objective,
                finalists(study, 1)[0],
                progress=lambda d, t: tell("trials", scalar + d, settings.trials),
                on_trial=on_trial,
            )
        best = finalists(study, settings.finalists, *([refined] if refined else []))
        played = play_off(prepared, best, budget, store, lambda d, t: tell("finalists", d, t))
        played.write(folder / "fidelity.json", prepared.task.metric, settings.split)
    finally:
        lock.release()
    start = Candidate.of(finalists(study, 1)[0].params)
    return Search(prepared, settings, budget, folder, study, refined, played, start)


class _Telling(Watch):
    """Hands phases on to a callback."""

    def __init__(self, tell: Progress) -> None:
        self._tell = tell

    def phase(self, name: str, done: int, total: int) -> None:
        self._tell(name, done, total)


def prove_winner(found: Search, *, progress: Progress | None = None, told: Told | None = None) -> Tuned:
    """Generate on held-out samples with the winner and its rivals, and write policy and proof."""
    tell, say = progress or (lambda phase, done, total: None), told or (lambda sentence: None)
    prepared, settings, played = found.prepared, found.settings, found.played
    for name, (rho, count) in played.correlations().items():
        say(f"rank correlation of {name} with {prepared.task.metric}: {rho:+.2f} over {count} policies")
    strongest = played.strongest
    who = f"tuned - {strongest.name}"
    say(power_sentence(settings.proof_samples, settings.margin, played.winner.metric, strongest.metric, who))
    others = rivals(played.winner.policy, found.budget, prepared.layers)
    if strongest.name not in {policy.name for policy in others}:
        others.append(strongest.policy)
    lock = FolderLock(found.folder)
    try:
        proof = prove(
            prepared,
            played.winner.policy,
            others,
            settings,
            store=AnswerStore(found.folder / "answers"),
            watch=_Telling(tell),
        )
        judged = verdict(proof, played.winner.policy.name, strongest.name, settings.margin)
        name = found.folder.resolve().name
        winner = with_provenance(prepared, settings, found.budget, played, proof, judged, name)
        knobs = knob_effects(found.candidate, prepared, found.budget, lambda d, t: tell("knobs", d, t))
        importances = parameter_importances(found.study)
        for table, file in ((knobs, "knobs.csv"), (importances, IMPORTANCES)):
            with replacing(found.folder / file) as partial:
                table.to_csv(partial, index=False)
        proof.to_parquet(found.folder / "proof.parquet")
        proof.to_csv(found.folder / "proof.csv")
        save_policy(winner, found.folder / "policy.yaml")
    finally:
        lock.release()
    return Tuned(winner, found.folder, found.study, found.refined, played, proof, judged, knobs, importances)


def _say_power(
    prepared: Prepared, settings: Settings, space: Space, budget: Budget, store: AnswerStore, say: Told
) -> None:
    """Before anything is searched: what the proof will be able to show, from a first look at uniform."""
    uniform = space.starts()[0].policy(prepared.evidence, budget, "uniform")
    dense, plain = prepared.dense_metric(store), prepared.generated(store).metric(uniform)
    say(power_sentence(settings.proof_samples, settings.margin, plain, dense, "uniform - dense"))
