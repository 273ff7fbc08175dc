"""What a launcher is: it starts worker processes somewhere, and says which of them have ended."""

from __future__ import annotations

import contextlib
import os
import platform
import runpy
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import TextIOBase
from pathlib import Path
from typing import ClassVar, Final

PARENT: Final = "AVLPROF_PARENT"
"""Process that started this worker on the same machine."""
WORKER: Final = "AVLPROF_WORKER"
"""Name of this worker, where a launcher started it."""
NUMBER: Final = "AVLPROF_NUMBER"
"""From 1 on, which of the workers of a machine this is, where a launcher started it beside others."""
USER_ERROR: Final = 2
STOP_SECONDS: Final = 10.0
_KEPT = 4000


@dataclass(frozen=True)
class Job:
    """What one worker runs.

    Attributes:
        name: of the worker, in letters, digits and `-`; a replacement has another one.
        words: what stands behind `python` on its command line; `-m MODULE ...`.
        environment: variables that are set for it.
        secrets: variables that reach it and are written nowhere.
        folder: its working directory, on every machine.
    """

    name: str
    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    folder: Path = field(default_factory=Path.cwd)


class Started(ABC):
    """A worker that a launcher started, or that waits for its turn on a cluster."""

    @abstractmethod
    def code(self) -> int | None:
        """None while it may still work, then its exit code; below 0, or 1, when it was lost."""

    @abstractmethod
    def last_words(self) -> str:
        """Of one that ended: the last line that it said, or why it was lost; may be empty."""

    @abstractmethod
    def stop(self) -> None:
        """Ask it to end; does not wait."""

    @abstractmethod
    def end(self, seconds: float) -> None:
        """Wait for it to end, at most so long; then it is gone."""


class Launcher(ABC):
    """Starts workers; subclasses are frozen dataclasses, whose fields are the launcher's options.

    A launcher knows nothing of models and tasks: a worker is a command line, which finds its work on
    disk or in a database. So whatever starts it, results are the same.

    Attributes:
        shares_machine: workers run on this machine, beside the process that starts them.
        passes_on: options are those of what it starts with, whatever their names: the launcher has one
            field, `arguments`, which holds them all.
    """

    shares_machine: ClassVar[bool] = False
    passes_on: ClassVar[bool] = False

    @abstractmethod
    def session(self, scratch: Path) -> contextlib.AbstractContextManager[Callable[[Job], Started]]:
        """Connects, and gives what starts a worker; on exit, what was connected is left.

        Args:
            scratch: a folder for the launcher's own files, which the machines of the workers see;
                not made, and removed by its owner.

        Raises:
            UserError: the package is not installed, no cluster answers, or an option does not fit.
        """


class _Tail(TextIOBase):
    """Keeps the end of what is written."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text = (self.text + text)[-_KEPT:]
        return len(text)


def run_python(job: Job) -> tuple[int, str]:
    """Run a job in this process, as `python WORDS` would; its exit code, and its last line.

    For launchers whose processes are there already. What it prints is dropped but for that line.
    """
    os.environ.update({**job.environment, **job.secrets, WORKER: job.name})
    try:
        os.chdir(job.folder)
    except OSError as error:
        reason = error.strerror or error
        return USER_ERROR, (
            f"error: {job.folder} is not there on {platform.node()} ({reason}); work in a folder that all "
            "machines see"
        )
    module, said = job.words[1], _Tail()
    sys.argv = [module, *job.words[2:]]
    sys.path.insert(0, "")
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(_Tail()):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
    return code, last_line(said.text)


def last_line(text: str) -> str:
    """The last line of a text that is not empty."""
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def orphaned() -> bool:
    """Whether this is a worker whose starter, on the same machine, is gone."""
    parent = os.environ.get(PARENT)
    return parent is not None and os.getppid() != int(parent)
