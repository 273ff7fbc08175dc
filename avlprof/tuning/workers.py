"""Who works on a study: this process, others that it starts, and joining one that was begun."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from avlprof.errors import UserError
from avlprof.launchers import WORKER, Crew, Launch, orphaned
from avlprof.locks import HAS_LOCKS, is_locked
from avlprof.models import LoadedModel, ModelSpec
from avlprof.tasks import Task
from avlprof.tasks.spec import TaskSpec
from avlprof.tuning.evidence import read_evidence
from avlprof.tuning.objective import Objective
from avlprof.tuning.prepared import Prepared
from avlprof.tuning.settings import Settings
from avlprof.tuning.space import Space
from avlprof.tuning.storages._base import StudyStorage, give_up, runs, trials_in
from avlprof.tuning.study import StudyMeta, claim_study, find_storage, stored_meta, study_meta
from avlprof.tuning.trials import Check, note_goal, read_goal, run_trials
from avlprof.watch import SILENT, Watch


@dataclass(frozen=True)
class Workers:
    """How many processes work on a study, this one included, and how the others find model and task.

    Attributes:
        count: processes, this one included; what starts the others says where they are.
        storage: URL of a PostgreSQL database for the trials, to share them with other machines; by
            default a journal in the study's folder.
        model: what further processes load; `avlprof.tune` knows it where the model is given by name.
        task: likewise what further processes read as the task.
        launcher: what starts further processes, a name of `avlprof.launchers.LAUNCHERS`.
        launcher_args: its options.

    Raises:
        UserError: less than one worker, or a launcher or an option that is not known.
    """

    count: int = 1
    storage: str | None = None
    model: ModelSpec | None = None
    task: TaskSpec | None = None
    launcher: str = "local"
    launcher_args: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _ = self.launch

    @property
    def launch(self) -> Launch:
        """How many processes, and what starts them."""
        return Launch(self.count, self.launcher, self.launcher_args)

    def named(self, model: ModelSpec | None, task: TaskSpec | None) -> Workers:
        """The same, with the names by which this process found model and task, where none are set.

        Raises:
            UserError: several workers, and not both are known by name.
        """
        known = replace(self, model=self.model or model, task=self.task or task)
        if self.count > 1 and (known.model is None or known.task is None):
            raise UserError("several workers load model and task by themselves; give both by name")
        return known

    def open(self, folder: Path) -> StudyStorage:
        """Where the trials of a study are."""
        return find_storage(folder, self.storage)

    def command(self, folder: Path, settings: Settings | None = None) -> list[str]:
        """What a further worker of a study runs, behind `python`."""
        model, task, settings = self.model or ModelSpec(), self.task or TaskSpec(), settings or Settings()
        words = ["-m", "avlprof", "studies", "join", str(folder.resolve())]
        words += [*model.words(), *task.words(), "--batch-size", str(settings.batch_size)]
        if settings.prompt_bytes is not None:
            words += ["--prompt-bytes", str(settings.prompt_bytes)]
        return words


def run_workers(
    workers: Workers,
    storage: StudyStorage,
    settings: Settings,
    objective: Objective,
    watch: Watch = SILENT,
) -> optuna.Study:
    """Run a study by several workers until all its trials are done; see `run_trials`."""
    note_goal(storage, settings)
    if workers.count == 1:
        return run_trials(storage, settings, objective, watch=watch)
    with study_crew(storage, workers.command(storage.folder, settings), workers.launch) as crew:
        check = crew_check(storage, crew)
        return run_trials(storage, settings, objective, shared=True, watch=watch, check=check)


def study_crew(storage: StudyStorage, words: Sequence[str], launch: Launch) -> Crew:
    """Those who work on a study beside this process; `words` join it, and end when it is done."""
    scratch = storage.folder / ".launcher"
    return Crew(launch, lambda number: (words, {}), scratch, "a trial", storage.secrets())


def crew_check(storage: StudyStorage, crew: Crew) -> Check:
    """What replaces the lost workers of a study, and queues their trials again."""

    def check(study: optuna.Study) -> None:
        def lost(name: str) -> bool:
            with storage.locked():
                for trial in trials_in(study, TrialState.RUNNING):
                    if runs(trial, name):
                        give_up(study, trial)
            return any(runs(trial, name) for trial in trials_in(study, TrialState.COMPLETE))

        crew.check(lost)

    return check


def join(
    loaded: LoadedModel,
    task: Task,
    storage: StudyStorage,
    *,
    batch_size: int = Settings.batch_size,
    prompt_bytes: int | None = Settings.prompt_bytes,
    watch: Watch = SILENT,
) -> optuna.Study:
    """Work on a study until its trials are done; what is searched follows from the study itself.

    Args:
        loaded: the study's model; the same checkpoint and precision.
        task: the study's task; the same samples.
        batch_size, prompt_bytes: as in `Settings`; each worker has its own.

    Raises:
        UserError: the study is not begun, or is one of another model or task.
    """
    meta = stored_meta(storage)
    _check_locks(storage)
    noted = _settings(meta, *read_goal(storage))
    settings = replace(noted, batch_size=batch_size, prompt_bytes=prompt_bytes)
    claim_study(storage, _meta_here(meta, loaded, task, settings))
    prepared = Prepared.make(loaded, task, read_evidence(storage), settings, watch)
    budget = prepared.budget(meta.budget, meta.read_budget)
    objective = prepared.objective(storage.folder, settings.space, budget)
    return run_trials(storage, settings, objective, shared=True, watch=watch, check=parent_check())


def _check_locks(storage: StudyStorage) -> None:
    """`UserError` for a started worker to which the lock of the study's folder looks free.

    Its leader holds that lock, so locks do not reach from one machine to the other.
    """
    lock = storage.folder / ".lock"
    if WORKER in os.environ and storage.address is None and HAS_LOCKS and not is_locked(lock):
        raise UserError(
            f"file locks of {storage.folder} do not reach {platform.node()}, which a journal needs; share "
            "the trials by PostgreSQL (--storage postgresql://user@host/database)"
        )


def _settings(meta: StudyMeta, trials: int, prune: bool) -> Settings:
    """The settings that a study was begun with, as far as its trials depend on them."""
    return Settings(
        read_budget=meta.read_budget,
        trials=trials,
        refine=0,
        refine_heads=0,
        samples=meta.samples,
        seed=meta.seed,
        prune=prune,
        objective=meta.objective,
        sampler=meta.sampler,
        halving=meta.halving,
        split=meta.split,
        max_new_tokens=meta.max_new_tokens,
        space=Space.of(meta.space),
    )


def _meta_here(meta: StudyMeta, loaded: LoadedModel, task: Task, settings: Settings) -> StudyMeta:
    """The study as this worker would search it; the model may be elsewhere on this machine."""
    if loaded.source != meta.model and not loaded.revision:
        raise UserError(f"{loaded.source} cannot be told to be {meta.model}, which the study is of")
    here = study_meta(loaded, task, meta.run_hash, meta.budget, settings)
    return here.model_copy(update={"model": meta.model, "space": meta.space})


def parent_check() -> Check | None:
    """For a worker that another process of its machine started: stops it when that one is gone."""

    def check(study: optuna.Study) -> None:
        if orphaned():
            raise UserError("the process that started this worker is gone; the same command resumes")

    return check
