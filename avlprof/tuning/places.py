"""Where the trials of a study are, and how its workers keep out of each other's way."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.trial import FrozenTrial, TrialState

from avlprof.errors import UserError
from avlprof.tuning.journal import journal, locked

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

JOURNAL = "journal.log"
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


class FolderPlace(Place):
    """A journal file in the study's folder, for processes of one machine.

    Every worker holds the lock of a file of its own, `.worker-<name>`, until it ends in whatever
    way; who finds the lock free knows that the worker is dead.
    """

    study_name = "avlprof"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def storage(self) -> BaseStorage:
        return JournalStorage(journal(self.folder / JOURNAL))

    def exists(self) -> bool:
        return (self.folder / JOURNAL).exists()

    def turn(self) -> contextlib.AbstractContextManager[None]:
        return locked(self.folder / ".turn")

    @contextlib.contextmanager
    def join(self, shared: bool) -> Iterator[str]:
        name = worker_name()
        own = self._presence(name)
        with contextlib.ExitStack() as held:
            with self.turn():
                held.enter_context(locked(own))
            held.callback(own.unlink, missing_ok=True)
            if shared and not is_locked(own):
                raise UserError(
                    f"{self.folder} is on a file system without file locks, which several workers need; "
                    "use one worker, or a database (--storage)"
                )
            yield name

    def begin(self, trial: optuna.Trial, worker: str) -> None:
        trial.set_user_attr(WORKER, worker)

    def lost(self, study: optuna.Study) -> list[FrozenTrial]:
        for path in self.folder.glob(self._presence("*").name):
            if not is_locked(path):
                path.unlink(missing_ok=True)
        return [trial for trial in _running(study) if not self._is_alive(trial.user_attrs.get(WORKER))]

    def busy(self, study: optuna.Study) -> bool:
        return any(is_locked(path) for path in self.folder.glob(self._presence("*").name))

    def _is_alive(self, worker: str | None) -> bool:
        return worker is not None and is_locked(self._presence(worker))

    def _presence(self, worker: str) -> Path:
        return self.folder / f".worker-{worker}"


def _running(study: optuna.Study) -> list[FrozenTrial]:
    found: list[FrozenTrial] = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return found


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


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on a file; never where there are no locks."""
    if fcntl is None:
        return False
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False
