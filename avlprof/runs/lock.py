"""One writer at a time in a folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from avlprof.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: the folder goes unguarded
    fcntl = None  # type: ignore[assignment]


class FolderLock:
    """Holds a folder (made if missing) under a name until `release` or the end of the process.

    The operating system lets go of the lock of a killed process, so none is ever stale. File
    systems without locks go unguarded.

    Raises:
        UserError: another writer holds it, or the folder cannot be written.
    """

    def __init__(self, folder: Path, name: str = "") -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(folder / f".lock{name}", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"folder {folder} cannot be written: {error.strerror or error}") from None
        try:
            if fcntl is not None:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise UserError(f"another process is writing to {folder}; wait for it or stop it") from None
        except OSError:
            return

    def release(self) -> None:
        """Let another writer in; again is harmless."""
        handle, self._handle = self._handle, -1
        with contextlib.suppress(OSError):
            os.close(handle)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self.release()
