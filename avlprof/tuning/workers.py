"""Further processes that work on a study beside the one that started them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO

import optuna
from optuna.trial import TrialState

from avlprof.errors import UserError
from avlprof.tuning.places import Place, runs
from avlprof.tuning.retries import give_up

PARENT = "AVLPROF_PARENT"
RESTARTS = 2
"""How often in a row a worker may die without having finished a trial, and is started again."""

USER_ERROR = 2
STOP_SECONDS = 10.0
_PREFIX = "error: "


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    deaths: int = 0


class Workers:
    """Starts `count` processes that work on a study, watches them, and stops them on leaving.

    `command` joins the study of `place` (it ends in `run_trials` with `shared`) and leaves when the
    study is done. A worker that was killed is replaced, and the trial that it ran is queued again;
    one that says why it cannot work, or is killed time and again before it finishes a trial, stops
    the study. Workers do not get the Ctrl-C of the terminal: the process that started them stops
    them, and they stop by themselves when it is gone.

    Raises:
        UserError: from `watch`, with what the worker said.
    """

    def __init__(self, place: Place, command: Sequence[str], count: int) -> None:
        self._place = place
        self._command = list(command)
        self._count = count
        self._environment = {**os.environ, **place.secrets(), PARENT: str(os.getpid())}
        if "OMP_NUM_THREADS" not in os.environ:
            self._environment["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // (count + 1), 1))
        self._workers: list[_Worker] = []

    @property
    def processes(self) -> list[int]:
        """Ids of the processes that were started last."""
        return [worker.process.pid for worker in self._workers]

    def __enter__(self) -> Workers:
        self._workers = [self._start() for _ in range(self._count)]
        return self

    def watch(self, study: optuna.Study) -> None:
        """Replace workers that died, and queue their trials again."""
        for index, worker in enumerate(self._workers):
            code = worker.process.poll()
            if not code:
                continue
            said = _last_line(worker.errors)
            if code == USER_ERROR:
                raise UserError(f"a worker stopped: {said.removeprefix(_PREFIX)}")
            self._give_up(study, worker.process.pid)
            done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            lived = any(runs(trial, worker.process.pid) for trial in done)
            deaths = 1 if lived else worker.deaths + 1
            if deaths > RESTARTS:
                raise UserError(
                    f"a worker died {deaths} times in a row without finishing a trial ({_cause(code)}"
                    f"{': ' + said if said else ''}); the same command resumes, with fewer --workers "
                    "it needs less memory"
                )
            worker.errors.close()
            self._workers[index] = self._start(deaths)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # a finished study gives them nothing more to do, an unfinished one queues their trials again
        until = time.monotonic() + STOP_SECONDS
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(until - time.monotonic(), 0))
            worker.process.kill()
            worker.process.wait()
            worker.errors.close()

    def _start(self, deaths: int = 0) -> _Worker:
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=self._environment,
            start_new_session=True,
        )
        return _Worker(process, errors, deaths)

    def _give_up(self, study: optuna.Study, process: int) -> None:
        with self._place.turn():
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if runs(trial, process):
                    give_up(study, trial)


def watch_parent() -> Callable[[optuna.Study], None] | None:
    """For a worker that `Workers` started: a `watch` that stops it when the starter is gone."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return None

    def watch(study: optuna.Study) -> None:
        if os.getppid() != int(parent):
            raise UserError("the process that started this worker is gone; the same command resumes")

    return watch


def _cause(code: int) -> str:
    with contextlib.suppress(ValueError):
        if code < 0:
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _last_line(file: IO[bytes]) -> str:
    file.seek(0, os.SEEK_END)
    file.seek(max(file.tell() - 4000, 0))
    lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""
