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
from avlprof.files import write_text
from avlprof.locks import HAS_LOCKS, is_locked, locked
from avlprof.tuning.storages._base import META, WORKER, StudyStorage, trials_in, worker_name
from avlprof.tuning.storages.records import STUDY, MendedJournal

JOURNAL = "journal.log"
BLOCK = 65536


def journal(path: Path) -> JournalFileBackend:
    """Optuna's journal in a file, which is made when it is missing."""
    return MendedJournal(str(path), lock_obj=_MendingLock(path))


class _MendingLock:
    """Lets one process append at a time, after cutting off a line that a killed one left torn.

    Optuna's own lock files outlive a killed process for 30 seconds, in which all others wait, and
    a line that is appended to a torn one makes the whole journal unreadable.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = path.with_name(f".{path.name}.lock")
        self._locks: Any = None

    def acquire(self) -> bool:
        self._locks = contextlib.ExitStack()
        if HAS_LOCKS:
            self._locks.enter_context(locked(self._lock))
        else:
            lock = JournalFileOpenLock(str(self._path))
            lock.acquire()
            self._locks.callback(lock.release)
        mend(self._path)
        return True

    def release(self) -> None:
        self._locks.close()


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
            last = file.read(end - start).rfind(b"\n")
            if last >= 0:
                file.truncate(start + last + 1)
                return
            end = start
        file.truncate(0)


class FolderStorage(StudyStorage):
    """A journal file in the study's folder, for processes of one machine.

    Every worker holds the lock of a file of its own, `.worker-<name>`, until it ends in whatever
    way; who finds the lock free knows that the worker is dead.
    """

    study_name = STUDY

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def backend(self) -> BaseStorage:
        path = self.folder / JOURNAL
        try:
            return JournalStorage(journal(path))
        except (OSError, ValueError, KeyError, AssertionError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise UserError(
                f"{path} cannot be read: {reason}; put a copy of it back, or begin anew"
            ) from None

    def exists(self) -> bool:
        return (self.folder / JOURNAL).exists()

    def missing(self) -> str:
        return f"{self.folder} is not a study (no {META}.json); make one with 'avlprof tune'"

    def read_note(self, name: str) -> str | None:
        path = self._note(name)
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None

    def write_note(self, name: str, text: str) -> None:
        write_text(self._note(name), text + "\n")

    def locked(self) -> contextlib.AbstractContextManager[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        return locked(self.folder / ".turn")

    @contextlib.contextmanager
    def join(self, shared: bool) -> Iterator[str]:
        name = worker_name()
        own = self._presence(name)
        with contextlib.ExitStack() as locks:
            with self.locked():
                locks.enter_context(locked(own))
            locks.callback(own.unlink, missing_ok=True)
            if shared and not is_locked(own):
                raise UserError(
                    f"{self.folder} is on a file system without file locks, which several workers need; "
                    "use one worker, or a database as storage"
                )
            yield name

    def begin(self, trial: optuna.Trial, worker: str) -> None:
        trial.set_user_attr(WORKER, worker)

    def lost(self, study: optuna.Study) -> list[FrozenTrial]:
        for path in self.folder.glob(self._presence("*").name):
            if not is_locked(path):
                path.unlink(missing_ok=True)
        running = trials_in(study, TrialState.RUNNING)
        dead = {trial.number for trial in running if not self._is_alive(trial.user_attrs.get(WORKER))}
        # looked at again: a worker may have finished its trial, and left, between the two looks
        return (
            [trial for trial in trials_in(study, TrialState.RUNNING) if trial.number in dead] if dead else []
        )

    def busy(self, study: optuna.Study) -> bool:
        return any(is_locked(path) for path in self.folder.glob(self._presence("*").name))

    def _is_alive(self, worker: str | None) -> bool:
        return worker is not None and is_locked(self._presence(worker))

    def _presence(self, worker: str) -> Path:
        return self.folder / f".worker-{worker}"

    def _note(self, name: str) -> Path:
        return self.folder / f"{name}.json"
