"""What the storage of a study is: its trials, its notes, and how its workers keep out of each other's way."""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import re
import secrets
import warnings
from abc import ABC, abstractmethod
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

HISTORY = "retry_history"


def retry(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a trial again with the parameters that it has so far; again is harmless.

    Optuna keeps the numbers of the earlier attempts. What the trial noted about itself is left
    behind, so that the next attempt tells of its own worker and score.
    """
    others = study.get_trials(deepcopy=False)
    if any(other.system_attrs.get(HISTORY, [])[-1:] == [trial.number] for other in others):
        return
    again = copy.deepcopy(trial)
    again.user_attrs = {}
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


WORKER = "worker"


class Place(ABC):
    """Holds the trials of one study, on which any number of processes work.

    A worker joins, and then takes turns: inside its turn it alone looks at the study, tells which
    trials were lost and decides what is run next. Trials run outside of turns.
    """

    study_name: str
    folder: Path

    @abstractmethod
    def storage(self) -> BaseStorage:
        """Optuna's storage, made when it is not there yet."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether a study was begun here; nothing is written."""

    @abstractmethod
    def turn(self) -> contextlib.AbstractContextManager[None]:
        """Waits for this process's turn, and holds it inside the context; a killed process's ends."""

    @abstractmethod
    def join(self, shared: bool) -> contextlib.AbstractContextManager[str]:
        """Makes this process a worker inside the context, and gives its name.

        Raises:
            UserError: `shared`, with other workers, and they could not be told from dead ones.
        """

    @abstractmethod
    def begin(self, trial: optuna.Trial, worker: str) -> None:
        """Note, within the turn that the trial was asked for in, who runs it."""

    @abstractmethod
    def lost(self, study: optuna.Study) -> list[FrozenTrial]:
        """Trials of workers that died, which are still marked as running. Within a turn."""

    @abstractmethod
    def busy(self, study: optuna.Study) -> bool:
        """Whether a worker is at it; nothing is written."""

    def secrets(self) -> dict[str, str]:
        """Environment variables that another process needs to get in, beside what the folder notes."""
        return {}


def worker_name() -> str:
    """A name that no other worker has: machine, process and a random end."""
    return f"{process_name(os.getpid())}-{secrets.token_hex(3)}"


def process_name(process: int) -> str:
    """How the name of a worker begins that is this process of this machine."""
    return re.sub(r"[^\w.-]", "-", f"{platform.node()}-{process}")


def runs(trial: FrozenTrial, process: int) -> bool:
    """Whether a trial was run by a process of this machine."""
    worker = str(trial.user_attrs.get(WORKER, ""))
    return worker.rpartition("-")[0] == process_name(process)
