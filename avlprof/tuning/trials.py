"""The trials of a study, by one worker or several; which one is next follows from the study alone."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from avlprof.errors import UserError
from avlprof.tuning.objective import Objective, Point
from avlprof.tuning.settings import Settings, make_sampler
from avlprof.tuning.storages._base import BATCH, StudyStorage, give_up, quiet, trials_in
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

    With `settings.halving` above 1 a worker takes so many at once, proposed one after the other with
    those before under way, and scores them together; which of them stop is decided among them alone.

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
        study = storage.open(pruner=_pruner(settings.prune and not settings.halves))
        known = {trial.number for trial in trials_in(study, TrialState.COMPLETE)}

        def tell() -> None:
            for trial in trials_in(study, TrialState.COMPLETE):
                if trial.number not in known:
                    known.add(trial.number)
                    watch.trial(study, trial)
                    watch.phase("trials", len(known), settings.trials)

        worker = _Worker(study, storage, settings, objective, name, tell)
        watch.phase("trials", len(known), settings.trials)
        while len(known) < settings.trials:
            if not worker.run_next():
                time.sleep(POLL_SECONDS)
            tell()
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
    """One of those who work on a study; `told` is called whenever a trial is done."""

    study: optuna.Study
    storage: StudyStorage
    settings: Settings
    objective: Objective
    name: str
    told: Callable[[], None]

    def run_next(self) -> bool:
        """Take the next trials inside the lock and score them outside; False while all are taken."""
        batch: list[optuna.Trial] = []
        try:
            with self.storage.locked():
                for trial in self.storage.lost(self.study):
                    give_up(self.study, trial)
                points, before = self._take(batch)
            with self.storage.alive(batch):
                self._score(list(zip(batch, points, strict=True)), before)
        except UpdateFinishedTrialError:  # taken for dead by another worker
            self._give_up(batch)
        except (Exception, KeyboardInterrupt):
            self._give_up(batch)
            raise
        return bool(batch)

    def _take(self, batch: list[optuna.Trial]) -> tuple[list[Point], list[FrozenTrial]]:
        """Begin the trials that are scored together next; their points, and who of them is done already.

        Each is proposed with those before it under way. What is left of a batch whose worker died
        is taken up as that batch again.
        """
        # one look at both: a trial may be finished between two, and would count as neither
        counted = trials_in(self.study, TrialState.COMPLETE, TrialState.RUNNING)
        done = [trial for trial in counted if trial.state == TrialState.COMPLETE]
        room, mark, points = self.settings.halving, None, list[Point]()
        while room > 0 and len(counted) + len(batch) < self.settings.trials:
            theirs = self._next_mark()
            if batch and theirs not in (None, mark):
                break
            seed = _seed(self.settings.seed, len(counted) + len(batch))
            self.study.sampler = make_sampler(self.settings.sampler, seed, done)
            batch.append(trial := self.study.ask())
            self.storage.begin(trial, self.name)
            if mark is None:
                mark = trial.number if theirs is None else theirs
                room -= sum(other.user_attrs.get(BATCH) == mark for other in counted)
            if self.settings.halving > 1:
                trial.set_user_attr(BATCH, mark)
            points.append(self.objective.suggest(trial))
            room -= 1
        return points, [trial for trial in done if mark is not None and trial.user_attrs.get(BATCH) == mark]

    def _score(self, batch: Sequence[tuple[optuna.Trial, Point]], before: Sequence[FrozenTrial]) -> None:
        if not batch:
            return
        scored = self.objective.score(batch, self.settings.halves, before)
        values = {trial.number: value for trial, value in scored}
        # in their order: were those told first that stopped first, and the worker died, what is left
        # would be numbered behind them, and samplers go by numbers
        for trial, _ in batch:
            self.study.tell(trial, values[trial.number], skip_if_finished=True)
            self.told()

    def _give_up(self, batch: Sequence[optuna.Trial]) -> None:
        """Queue again what is not done of a batch."""
        numbers = {trial.number for trial in batch}
        with self.storage.locked():
            for trial in trials_in(self.study, TrialState.RUNNING):
                if trial.number in numbers:
                    give_up(self.study, trial)

    def _next_mark(self) -> int | None:
        """The batch of the trial that waits first, after making the first start that nobody runs or has
        run wait, unless one waits already."""
        states = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)
        known = trials_in(self.study, *states)
        waiting = next((trial for trial in known if trial.state == TrialState.WAITING), None)
        if waiting is not None:
            mark: int | None = waiting.user_attrs.get(BATCH)
            return mark
        begun = [trial.system_attrs.get("fixed_params") for trial in known]
        starts = [start.params(self.objective.budget) for start in self.objective.space.starts()]
        left = next((start for start in starts if start not in begun), None)
        if left is not None:
            self.study.enqueue_trial(left)
        return None


def _seed(seed: int, taken: int) -> int:
    return int(np.random.SeedSequence([seed, taken]).generate_state(1)[0])


def _pruner(prune: bool) -> optuna.pruners.BasePruner:
    if not prune:
        return optuna.pruners.NopPruner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return optuna.pruners.WilcoxonPruner(p_threshold=0.05, n_startup_steps=8)
