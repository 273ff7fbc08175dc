"""Locks of files: who may write to a folder, and waiting for one another."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from avlprof.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: the folder goes unguarded
    fcntl = None  # type: ignore[assignment]

HAS_LOCKS = fcntl is not None
"""Whether the operating system has file locks; without them folders go unguarded."""

PATIENCE = 1.0  # seconds that another may take to join


class FolderLock:
    """Holds a folder (made if missing) until `release` or the end of the process.

    Without a name the holder is alone. Writers with different names share the folder if they
    state the same `team`: a launch of two processes and one of three do not mix, since they would
    share out the work differently.

    The operating system lets go of the lock of a killed process, so none is ever stale. File
    systems without locks go unguarded.

    Raises:
        UserError: another writer holds it, or the folder cannot be written.
    """

    def __init__(self, folder: Path, name: str = "", team: str = "") -> None:
        self._folder, self._handles = folder, list[int]()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if name:
                self._join(self._opened(".lock"), team)
                self._take(self._opened(f".lock{name}"), alone=True)
            else:
                self._take(self._opened(".lock"), alone=True)
        except BlockingIOError:
            raise self._refusal() from None
        except OSError as error:
            self.release()
            raise UserError(f"folder {folder} cannot be written: {error.strerror or error}") from None

    def release(self) -> None:
        """Let another writer in; again is harmless."""
        handles, self._handles = self._handles, []
        for handle in handles:
            with contextlib.suppress(OSError):
                os.close(handle)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def __del__(self) -> None:
        if hasattr(self, "_handles"):
            self.release()

    def _opened(self, name: str) -> int:
        handle = os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        self._handles.append(handle)
        return handle

    def _join(self, handle: int, team: str) -> None:
        """Share a file with those of the same team; who is there first writes its name in."""
        until = time.monotonic() + PATIENCE
        while True:
            try:
                self._take(handle, alone=True)
                os.ftruncate(handle, 0)
                os.pwrite(handle, team.encode(), 0)
            except BlockingIOError:
                pass
            try:
                self._take(handle, alone=False)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
        # read again also by the first: between its two locks another team may have come in
        if os.pread(handle, 256, 0).decode(errors="replace") != team and fcntl is not None:
            raise self._refusal()

    def _take(self, handle: int, alone: bool) -> None:
        """Lock a file or raise `BlockingIOError`; without locks of the file system, nothing."""
        if fcntl is None:
            return
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            return

    def _refusal(self) -> UserError:
        self.release()
        return busy(self._folder)


def check_free(folder: Path) -> None:
    """`UserError` when another process is writing to a folder; asked before any work, and makes nothing."""
    if is_locked(folder / ".lock"):
        raise busy(folder)


def busy(folder: Path) -> UserError:
    """What to say of a folder that another process writes to."""
    return UserError(f"another process is writing to {folder}; wait for it or stop it")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds back Ctrl-C, TERM and HUP inside, and lets the first of them through at the end.

    For writing what would be lost. Outside of the main thread, where no signal arrives, nothing
    is held.
    """
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    before = {number: signal.getsignal(number) for number in numbers}
    held = [number for number, handler in before.items() if callable(handler)]
    for number in held:
        signal.signal(number, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        for number in held:
            signal.signal(number, before[number])
        if arrived:
            number, frame = arrived[0]
            handler = before[number]
            if callable(handler):
                handler(number, frame)


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


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock on a file; never where there are no locks.

    Nothing is written, and a file that may only be read will do.
    """
    if fcntl is None:
        return False
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
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
