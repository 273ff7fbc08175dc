"""What the storage of a study is: its trials, its notes, and how its workers keep out of each other's way."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import platform
import re
import secrets
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from avlprof.launchers import WORKER as WORKER_NAME

HISTORY = "retry_history"
WORKER = "worker"
BATCH = "batch"
"""What a trial notes of those that it is scored together with, which outlives its worker."""
META, EVIDENCE = "study", "evidence"
"""Names of the notes: what the study is about, and what allocators look at."""


class StudyStorage(ABC):
    """Holds the trials of one study, on which any number of processes work, and its notes.

    A worker joins, and then goes on in steps: inside `locked` it alone looks at the study, finds
    which trials were lost and decides what is run next. Trials run outside of the lock. Notes are
    JSON texts, the same for all workers.

    Attributes:
        study_name: Optuna's name of the study.
        folder: of the study on this machine.
        address: where other machines find the study, without a password; None: the folder holds it.
    """

    study_name: str
    folder: Path
    address: str | None = None

    @abstractmethod
    def backend(self) -> BaseStorage:
        """Optuna's storage, made when it is not there yet."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether a study was begun here; nothing is written."""

    @abstractmethod
    def missing(self) -> str:
        """A sentence that no study was begun here, and how to begin one."""

    @abstractmethod
    def read_note(self, name: str) -> str | None:
        """A note of the study, or None; nothing is written."""

    @abstractmethod
    def write_note(self, name: str, text: str) -> None:
        """Note a JSON text, inside the lock; the study is made when it is not there yet."""

    @abstractmethod
    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Waits for the lock of the study and holds it inside the context; a killed process lets go."""

    @abstractmethod
    def join(self, shared: bool) -> contextlib.AbstractContextManager[str]:
        """Makes this process a worker inside the context, and gives its name.

        Raises:
            UserError: `shared`, with other workers, and they could not be told from dead ones.
        """

    @abstractmethod
    def begin(self, trial: optuna.Trial, worker: str) -> None:
        """Note who runs a trial, inside the lock that it was taken in."""

    def alive(self, trials: Sequence[optuna.Trial]) -> contextlib.AbstractContextManager[None]:
        """Gives the signs of life of running trials inside the context, where the storage wants any."""
        return contextlib.nullcontext()

    @abstractmethod
    def lost(self, study: optuna.Study) -> list[FrozenTrial]:
        """Trials of workers that died, which are still marked as running. Inside the lock."""

    @abstractmethod
    def busy(self, study: optuna.Study) -> bool:
        """Whether a worker is at it; nothing is written."""

    def secrets(self) -> dict[str, str]:
        """Environment variables that another process needs to get in, beside what the folder notes."""
        return {}

    def open(self, pruner: optuna.pruners.BasePruner | None = None) -> optuna.Study:
        """The Optuna study, made when it is not there yet; lower values are better."""
        with quiet():
            return optuna.create_study(
                study_name=self.study_name,
                storage=self.backend(),
                pruner=pruner or optuna.pruners.NopPruner(),
                direction="minimize",
                load_if_exists=True,
            )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Optuna's own log lines are shown from errors on, inside the context.

    Its warnings would print the traceback of a trial that stopped; the exception itself goes on.
    """
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def trials_in(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """The trials of a study in these states, not to be changed."""
    trials: list[FrozenTrial] = study.get_trials(deepcopy=False, states=states)
    return trials


def retry(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a trial again with the parameters that it has so far; again is harmless.

    Optuna keeps the numbers of the earlier attempts. What the trial noted about itself, but its batch,
    is left behind, so that the next attempt tells of its own worker and score.
    """
    others = study.get_trials(deepcopy=False)
    if any(other.system_attrs.get(HISTORY, [])[-1:] == [trial.number] for other in others):
        return
    again = copy.deepcopy(trial)
    again.user_attrs = {name: value for name, value in trial.user_attrs.items() if name == BATCH}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        RetryHeartbeatStaleTrialCallback()(study, again)


def give_up(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a running trial again and mark it as failed.

    In this order: a process that is killed in between leaves a trial that is given up by the
    next, and not one that is lost.
    """
    retry(study, trial)
    study.tell(trial.number, state=TrialState.FAIL)


def origin(trial: FrozenTrial) -> int:
    """The number of a trial's first attempt."""
    return int(trial.system_attrs.get(HISTORY, [trial.number])[0])


def worker_name() -> str:
    """A name that no other worker has: as it was started, or machine and process, and a random end."""
    own = os.environ.get(WORKER_NAME) or f"{platform.node()}-{os.getpid()}"
    plain = re.sub(r"[^\w.-]", "-", own)
    return f"{plain}-{secrets.token_hex(3)}"


def runs(trial: FrozenTrial, name: str) -> bool:
    """Whether a trial was run by the worker that a launcher started under a name."""
    worker = str(trial.user_attrs.get(WORKER, ""))
    return worker.rpartition("-")[0] == name
