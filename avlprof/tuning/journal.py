"""The journal of a study: a file to which several processes append, and which survives their deaths."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BLOCK = 65536


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Waits for the lock on a file (made if missing) and holds it inside the context.

    The operating system lets go of the lock of a killed process. Without file locks (Windows)
    nothing is held.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


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
        if fcntl is not None:
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
