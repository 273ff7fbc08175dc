"""Workers as processes of this machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar

from avlprof.launchers._base import PARENT, WORKER, Job, Launcher, Started, last_line


@dataclass(frozen=True)
class Local(Launcher):
    """Processes beside this one.

    They do not get the Ctrl-C of the terminal: the process that started them stops them, and they
    stop by themselves when it is gone (`orphaned`).
    """

    shares_machine: ClassVar[bool] = True

    @contextlib.contextmanager
    def session(self, scratch: Path) -> Iterator[Callable[[Job], Started]]:
        yield Process


class Process(Started):
    """A process of this machine."""

    def __init__(self, job: Job) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self.popen = subprocess.Popen(
            [sys.executable, *job.words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env={
                **os.environ, **job.environment, **job.secrets,
                PARENT: str(os.getpid()), WORKER: job.name,
            },
            cwd=job.folder,
            start_new_session=True,
        )  # fmt: skip

    def code(self) -> int | None:
        return self.popen.poll()

    def last_words(self) -> str:
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(self._errors.tell() - 4000, 0))
        return last_line(self._errors.read().decode(errors="replace"))

    def stop(self) -> None:
        self.popen.terminate()

    def end(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(seconds)
        self.popen.kill()
        self.popen.wait()
        self._errors.close()
