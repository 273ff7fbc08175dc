"""The workers of one job: started by a launcher, watched, replaced when they die, stopped at the end."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from avlprof.errors import UserError
from avlprof.launchers._base import NUMBER, STOP_SECONDS, USER_ERROR, Job, Launcher, Started
from avlprof.registry import Registry

OWN_THREADS: Final = "AVLPROF_THREADS"
"""Set where the command line, not the user, chose `OMP_NUM_THREADS`."""
RESTARTS: Final = 2
"""How often in a row a worker may die without having finished anything, and is started again."""
_PREFIX = "error: "

LAUNCHERS: Registry[type[Launcher]] = Registry(
    "launcher",
    {
        "local": "avlprof.launchers.local:Local",
        "ray": "avlprof.launchers.ray:Ray",
        "submitit": "avlprof.launchers.submitit:Submitit",
    },
)
"""Launchers by name; entry points of the group `avlprof.launchers` add to them."""


@dataclass(frozen=True)
class Launch:
    """How many processes work, the one that leads included, and what starts the others.

    Attributes:
        workers: processes in all.
        launcher: a name of `LAUNCHERS`.
        arguments: options of the launcher.

    Raises:
        UserError: less than one worker, or a launcher or an option that is not known.
    """

    workers: int = 1
    launcher: str = "local"
    arguments: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"workers must be 1 or more, got {self.workers}")
        self.make()

    def make(self) -> Launcher:
        """The launcher."""
        options = dict(self.arguments or {})
        if LAUNCHERS.get(self.launcher).passes_on:
            options = {"arguments": options}
        launcher: Launcher = LAUNCHERS.make(self.launcher, options)
        return launcher

    @property
    def alone(self) -> bool:
        """Whether nobody is started."""
        return self.workers == 1


@dataclass
class _Member:
    job: Job
    started: Started
    deaths: int = 0


class Crew:
    """Starts all workers of a launch but the one that leads, which is this process, and watches them.

    A worker that is lost is replaced; one that says why it cannot work, or is lost time and again
    before it finishes anything, stops the whole.

    Args:
        launch: how many, and by what.
        jobs: words behind `python`, and variables, of the worker of a number from 1 on.
        scratch: folder for the launcher's own files, removed at the end.
        unit: what a worker finishes, for messages.
        secrets: variables that are written nowhere.

    Raises:
        UserError: from `check`, with what the worker said; on entering, the launcher's.
    """

    def __init__(
        self,
        launch: Launch,
        jobs: Callable[[int], tuple[Sequence[str], Mapping[str, str]]],
        scratch: Path,
        unit: str = "a trial",
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        self._launch, self._jobs, self._scratch, self._unit = launch, jobs, scratch, unit
        self._launcher = launch.make()
        self._secrets = secrets or {}
        self._members: list[_Member] = []
        self._session = contextlib.ExitStack()

    @property
    def names(self) -> list[str]:
        """Names of the workers that were started last."""
        return [member.job.name for member in self._members]

    @property
    def started(self) -> list[Started]:
        """The workers that were started last."""
        return [member.started for member in self._members]

    @property
    def over(self) -> bool:
        """Whether all have ended well."""
        return all(started.code() == 0 for started in self.started)

    def __enter__(self) -> Crew:
        self._start = self._session.enter_context(self._launcher.session(self._scratch))
        self._session.callback(shutil.rmtree, self._scratch, ignore_errors=True)
        try:
            for number in range(1, self._launch.workers):
                self._members.append(self._begin(number, 0))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def check(self, lost: Callable[[str], bool] = lambda name: False) -> None:
        """Replace workers that were lost.

        Args:
            lost: called with the name of each of them; gives back what it had in hand, and says
                whether it had finished anything.
        """
        for index, member in enumerate(self._members):
            code = member.started.code()
            if not code:
                continue
            last_words = member.started.last_words()
            if code == USER_ERROR:
                raise UserError(f"a worker stopped: {last_words.removeprefix(_PREFIX)}")
            deaths = 1 if lost(member.job.name) else member.deaths + 1
            if deaths > RESTARTS:
                raise UserError(
                    f"a worker died {deaths} times in a row without finishing {self._unit} ({_cause(code)}"
                    f"{': ' + last_words if last_words else ''}); the same command resumes, "
                    "with fewer workers it needs less memory"
                )
            member.started.end(0)
            self._members[index] = self._begin(index + 1, deaths)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        until = time.monotonic() + STOP_SECONDS
        with self._session:
            for started in self.started:
                started.stop()
            for started in self.started:
                started.end(max(until - time.monotonic(), 0))

    def _begin(self, number: int, deaths: int) -> _Member:
        words, variables = self._jobs(number)
        name = f"w{number}-{secrets.token_hex(4)}"
        job = Job(name, tuple(words), {**self._here(number), **variables}, self._secrets)
        return _Member(job, self._start(job), deaths)

    def _here(self, number: int) -> dict[str, str]:
        """For workers of this machine: which one it is, and its part of the cores unless the user chose."""
        if not self._launcher.shares_machine:
            return {}
        variables = {NUMBER: str(number)}
        if "OMP_NUM_THREADS" not in os.environ or OWN_THREADS in os.environ:
            variables["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // self._launch.workers, 1))
        return variables


def _cause(code: int) -> str:
    with contextlib.suppress(ValueError):
        if code < 0:
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"
