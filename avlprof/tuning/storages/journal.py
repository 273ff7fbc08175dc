"""The journal of a study: a file to which several processes append, and which survives their deaths."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from avlprof.errors import UserError
from avlprof.locks import HAS_LOCKS, is_locked, locked
from avlprof.tuning.storages._base import WORKER, Place, worker_name

JOURNAL = "journal.log"
BLOCK = 65536


def journal(path: Path) -> JournalFileBackend:
    """Optuna's journal in a file, which is made when it is missing."""
    return JournalFileBackend(str(path), lock_obj=_MendingLock(path))


class _MendingLock:
    """Lets one process append at a time, after cutting off a line that a killed one left torn.

    Optuna's own lock files outlive a killed process for 30 seconds, in which all others wait, and
    a line that is appended to a torn one makes the whole journal unreadable.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = path.with_name(f".{path.name}.lock")
        self._held: Any = None

    def acquire(self) -> bool:
        self._held = contextlib.ExitStack()
        if HAS_LOCKS:
            self._held.enter_context(locked(self._lock))
        else:
            lock = JournalFileOpenLock(str(self._path))
            lock.acquire()
            self._held.callback(lock.release)
        mend(self._path)
        return True

    def release(self) -> None:
        self._held.close()


def mend(path: Path) -> None:
    """Cut off what stands behind the last line break of a file."""
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        if file.read(1) in (b"\n", b""):
            return
        while end:
            start = max(end - BLOCK, 0)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                file.truncate(start + found + 1)
                return
            end = start
        file.truncate(0)


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
