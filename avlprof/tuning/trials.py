"""The trials of a study, by one worker or several; which one is next follows from the study alone."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from avlprof.errors import UserError
from avlprof.tuning.objective import Objective, Points
from avlprof.tuning.settings import Settings, make_sampler
from avlprof.tuning.storages._base import Place, give_up, retry
from avlprof.tuning.study import find_place, open_study, quiet

Told = Callable[[int, int], None]
WANTED, PRUNE = "trials", "prune"
POLL_SECONDS = 0.1


def run_trials(
    folder: Path,
    settings: Settings,
    space: Points,
    objective: Objective,
    *,
    progress: Told | None = None,
    on_trial: Callable[[optuna.Study, FrozenTrial], None] | None = None,
    place: Place | None = None,
    shared: bool = False,
    watch: Callable[[optuna.Study], None] | None = None,
) -> optuna.Study:
    """Run the study of a folder until it has `settings.trials` finished trials, no more and no less.

    The starts of the space come first, in their order, then the sampler's. The sampler is seeded
    by seed and number of trials that are finished or under way, so a study with one worker that
    was stopped at any point goes on with the very trials of one that was not.

    Any number of processes may call this at once. A worker takes a trial only while less than
    `settings.trials` are finished or under way; near the end it waits for those of the others. A
    trial whose worker died is marked as failed, and queued again with its parameters.

    Args:
        progress: called with trials finished and trials wanted, those of other workers included.
        on_trial: called with study and trial after each trial, of whichever worker.
        place: where the trials are, by default what `find_place` says of the folder.
        shared: other workers are wanted; refused where they cannot keep out of each other's way.
        watch: called with the study between trials and while waiting for those of others.
    """
    place = place or find_place(folder)
    with quiet(), place.join(shared) as me:
        note_asked(place, settings)
        study = open_study(place, pruner=_pruner(settings.prune))
        starts = [start.params(objective.budget) for start in space.starts()]
        known = {trial.number for trial in _in(study, TrialState.COMPLETE)}
        if progress:
            progress(len(known), settings.trials)
        while len(known) < settings.trials:
            if not _run_one(study, settings, starts, objective, place, me):
                time.sleep(POLL_SECONDS)
            for trial in _in(study, TrialState.COMPLETE):
                if trial.number not in known:
                    known.add(trial.number)
                    if on_trial:
                        on_trial(study, trial)
                    if progress:
                        progress(len(known), settings.trials)
            if watch:
                watch(study)
    return study


def note_asked(place: Place, settings: Settings) -> None:
    """Note in the study how many trials are wanted and whether they are pruned."""
    study = open_study(place)
    for name, value in ((WANTED, settings.trials), (PRUNE, settings.prune)):
        if study.user_attrs.get(name) != value:
            study.set_user_attr(name, value)


def asked_of(place: Place) -> tuple[int, bool]:
    """How many trials a study wants, and whether they are pruned.

    Raises:
        UserError: the study is not begun.
    """
    attributes = open_study(place).user_attrs if place.exists() else {}
    if WANTED not in attributes:
        raise UserError(f"study {place.folder} is not begun; begin it with 'avlprof tune'")
    return int(attributes[WANTED]), bool(attributes.get(PRUNE, True))


def _in(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    found: list[FrozenTrial] = study.get_trials(deepcopy=False, states=states)
    return found


def _run_one(
    study: optuna.Study,
    settings: Settings,
    starts: list[dict[str, Any]],
    objective: Objective,
    place: Place,
    me: str,
) -> bool:
    """Take the next trial in a turn and run it behind the turn; False while all are taken."""
    number, failed = -1, False
    with contextlib.ExitStack() as turn:
        turn.enter_context(place.turn())
        for trial in place.lost(study):
            give_up(study, trial)
        taken = len(_in(study, TrialState.COMPLETE, TrialState.RUNNING))
        if taken >= settings.trials:
            return False
        study.sampler = make_sampler(settings.sampler, _seed(settings.seed, taken))
        _queue_start(study, starts)

        def run(trial: optuna.Trial) -> float:
            nonlocal number, failed
            number = trial.number
            place.begin(trial, me)
            turn.close()
            try:
                return objective(trial)
            except UpdateFinishedTrialError:
                raise
            except BaseException:
                failed = True
                raise

        try:
            study.optimize(run, n_trials=1)
        except Exception:
            # Was this worker taken for dead? Then another one runs the trial again, and its score
            # does not count. Optuna says so by several exceptions.
            if failed or number < 0 or study.get_trials(deepcopy=False)[number].state != TrialState.FAIL:
                raise
        except KeyboardInterrupt:
            turn.close()
            with place.turn():
                for trial in _in(study, TrialState.FAIL):
                    if trial.number == number:
                        retry(study, trial)
            raise
    return True


def _queue_start(study: optuna.Study, starts: list[dict[str, Any]]) -> None:
    """Make the first start that nobody has run or is running the next trial, unless one waits already."""
    known = _in(study, TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)
    if any(trial.state == TrialState.WAITING for trial in known):
        return
    begun = [trial.system_attrs.get("fixed_params") for trial in known]
    left = next((start for start in starts if start not in begun), None)
    if left is not None:
        study.enqueue_trial(left)


def _seed(seed: int, taken: int) -> int:
    return int(np.random.SeedSequence([seed, taken]).generate_state(1)[0])


def _pruner(prune: bool) -> optuna.pruners.BasePruner:
    if not prune:
        return optuna.pruners.NopPruner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return optuna.pruners.WilcoxonPruner(p_threshold=0.05, n_startup_steps=8)
