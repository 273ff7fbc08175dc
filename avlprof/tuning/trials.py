"""The trials of a study, by one worker or several; which one is next follows from the study alone."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.trial import TrialState

from avlprof.errors import UserError
from avlprof.tuning.objective import Objective
from avlprof.tuning.settings import Settings, make_sampler
from avlprof.tuning.storages._base import StudyStorage, give_up, quiet, retry, trials_in
from avlprof.watch import SILENT, Watch

TRIALS, PRUNE = "trials", "prune"
POLL_SECONDS = 0.1

Check = Callable[[optuna.Study], None]


def run_trials(
    storage: StudyStorage,
    settings: Settings,
    objective: Objective,
    *,
    shared: bool = False,
    watch: Watch = SILENT,
    check: Check | None = None,
) -> optuna.Study:
    """Run a study until it has `settings.trials` finished trials, no more and no less.

    The starts of the objective's space come first, in their order, then the sampler's. The sampler
    is seeded by seed and number of trials that are finished or under way, so a study with one
    worker that was stopped at any point goes on with the very trials of one that was not.

    Any number of processes may call this at once. A worker takes a trial only while less than
    `settings.trials` are finished or under way; near the end it waits for those of the others. A
    trial whose worker died is marked as failed, and queued again with its parameters.

    Args:
        shared: other workers are wanted; refused where they cannot keep out of each other's way.
        watch: told of the phase `trials`, those of other workers included, and of each trial.
        check: called with the study between trials and while waiting for those of others.
    """
    with quiet(), storage.join(shared) as name:
        note_goal(storage, settings)
        study = storage.open(pruner=_pruner(settings.prune))
        worker = _Worker(study, storage, settings, objective, name)
        known = {trial.number for trial in trials_in(study, TrialState.COMPLETE)}
        watch.phase("trials", len(known), settings.trials)
        while len(known) < settings.trials:
            if not worker.run_next():
                time.sleep(POLL_SECONDS)
            for trial in trials_in(study, TrialState.COMPLETE):
                if trial.number not in known:
                    known.add(trial.number)
                    watch.trial(study, trial)
                    watch.phase("trials", len(known), settings.trials)
            if check:
                check(study)
    return study


def note_goal(storage: StudyStorage, settings: Settings) -> None:
    """Note in the study how many trials are wanted and whether they are pruned."""
    study = storage.open()
    for name, value in ((TRIALS, settings.trials), (PRUNE, settings.prune)):
        if study.user_attrs.get(name) != value:
            study.set_user_attr(name, value)


def read_goal(storage: StudyStorage) -> tuple[int, bool]:
    """How many trials a study wants, and whether they are pruned.

    Raises:
        UserError: the study is not begun.
    """
    attributes = storage.open().user_attrs if storage.exists() else {}
    if TRIALS not in attributes:
        raise UserError(f"study {storage.folder} is not begun; begin it with 'avlprof tune'")
    return int(attributes[TRIALS]), bool(attributes.get(PRUNE, True))


@dataclass(frozen=True)
class _Worker:
    """One of those who work on a study."""

    study: optuna.Study
    storage: StudyStorage
    settings: Settings
    objective: Objective
    name: str

    def run_next(self) -> bool:
        """Take the next trial inside the lock and run it outside; False while all are taken."""
        with contextlib.ExitStack() as lock:
            lock.enter_context(self.storage.locked())
            for trial in self.storage.lost(self.study):
                give_up(self.study, trial)
            # one look at both: a trial may be finished between two, and would count as neither
            counted = trials_in(self.study, TrialState.COMPLETE, TrialState.RUNNING)
            done, taken = [t for t in counted if t.state == TrialState.COMPLETE], len(counted)
            if taken >= self.settings.trials:
                return False
            self.study.sampler = make_sampler(self.settings.sampler, _seed(self.settings.seed, taken), done)
            self._queue_start()
            self._run(_Attempt(self, lock))
        return True

    def _run(self, attempt: _Attempt) -> None:
        try:
            # not by ask and tell: only `optimize` sends the signs of life that a database counts on
            self.study.optimize(attempt, n_trials=1)
        except Exception:
            if attempt.failed or not self._taken_for_dead(attempt.number):
                raise
        except KeyboardInterrupt:
            attempt.lock.close()
            with self.storage.locked():
                for trial in trials_in(self.study, TrialState.FAIL):
                    if trial.number == attempt.number:
                        retry(self.study, trial)
            raise

    def _taken_for_dead(self, number: int) -> bool:
        """Whether another worker gave up the trial meanwhile: then its score does not count.

        Optuna says so by several exceptions.
        """
        return number >= 0 and self.study.get_trials(deepcopy=False)[number].state == TrialState.FAIL

    def _queue_start(self) -> None:
        """Make the first start that nobody runs or has run the next trial, unless one waits already."""
        states = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)
        known = trials_in(self.study, *states)
        if any(trial.state == TrialState.WAITING for trial in known):
            return
        begun = [trial.system_attrs.get("fixed_params") for trial in known]
        starts = [start.params(self.objective.budget) for start in self.objective.space.starts()]
        left = next((start for start in starts if start not in begun), None)
        if left is not None:
            self.study.enqueue_trial(left)


@dataclass
class _Attempt:
    """Runs the objective once: lets go of the lock as soon as the trial is noted as this worker's.

    `failed` says that the objective itself raised.
    """

    worker: _Worker
    lock: contextlib.ExitStack
    number: int = -1
    failed: bool = False

    def __call__(self, trial: optuna.Trial) -> float:
        self.number = trial.number
        self.worker.storage.begin(trial, self.worker.name)
        self.lock.close()
        try:
            return self.worker.objective(trial)
        except UpdateFinishedTrialError:
            raise
        except BaseException:
            self.failed = True
            raise


def _seed(seed: int, taken: int) -> int:
    return int(np.random.SeedSequence([seed, taken]).generate_state(1)[0])


def _pruner(prune: bool) -> optuna.pruners.BasePruner:
    if not prune:
        return optuna.pruners.NopPruner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return optuna.pruners.WilcoxonPruner(p_threshold=0.05, n_startup_steps=8)
