"""Who works on a study: this process, others that it starts, and joining one that was begun."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO

import optuna
from optuna.trial import TrialState

from avlprof.errors import UserError
from avlprof.models import LoadedModel, ModelSpec
from avlprof.tasks import Task
from avlprof.tasks.spec import TaskSpec
from avlprof.tuning.evidence import read_evidence
from avlprof.tuning.objective import Objective
from avlprof.tuning.prepared import Prepared
from avlprof.tuning.settings import Settings
from avlprof.tuning.space import Space
from avlprof.tuning.storages._base import StudyStorage, give_up, runs, trials_in
from avlprof.tuning.study import StudyMeta, claim_study, find_storage, stored_meta, study_meta
from avlprof.tuning.trials import Check, note_goal, read_goal, run_trials
from avlprof.watch import SILENT, Watch

PARENT = "AVLPROF_PARENT"
OWN_THREADS = "AVLPROF_THREADS"
"""Set where the command line, not the user, chose `OMP_NUM_THREADS`."""
RESTARTS = 2
"""How often in a row a worker may die without having finished a trial, and is started again."""

USER_ERROR = 2
STOP_SECONDS = 10.0
_PREFIX = "error: "


@dataclass(frozen=True)
class Workers:
    """How many processes work on a study, this one included, and how the others find model and task.

    Attributes:
        count: processes on this machine.
        storage: URL of a PostgreSQL database for the trials, to share them with other machines; by
            default a journal in the study's folder.
        model: what further processes load; `avlprof.tune` knows it where the model is given by name.
        task: likewise what further processes read as the task.

    Raises:
        UserError: less than one worker.
    """

    count: int = 1
    storage: str | None = None
    model: ModelSpec | None = None
    task: TaskSpec | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"workers must be 1 or more, got {self.count}")

    def named(self, model: ModelSpec | None, task: TaskSpec | None) -> Workers:
        """The same, with the names by which this process found model and task, where none are set.

        Raises:
            UserError: several workers, and not both are known by name.
        """
        known = replace(self, model=self.model or model, task=self.task or task)
        if self.count > 1 and (known.model is None or known.task is None):
            raise UserError("several workers load model and task by themselves; give both by name")
        return known

    def open(self, folder: Path) -> StudyStorage:
        """Where the trials of a study are."""
        return find_storage(folder, self.storage)

    def command(self, folder: Path, settings: Settings | None = None) -> list[str]:
        """What starts a further worker of a study on this machine."""
        model, task, settings = self.model or ModelSpec(), self.task or TaskSpec(), settings or Settings()
        words = [sys.executable, "-m", "avlprof", "studies", "join", str(folder)]
        words += [*model.words(), *task.words(), "--batch-size", str(settings.batch_size)]
        if settings.prompt_bytes is not None:
            words += ["--prompt-bytes", str(settings.prompt_bytes)]
        return words


def run_workers(
    workers: Workers,
    storage: StudyStorage,
    settings: Settings,
    objective: Objective,
    watch: Watch = SILENT,
) -> optuna.Study:
    """Run a study by several workers until all its trials are done; see `run_trials`."""
    note_goal(storage, settings)
    if workers.count == 1:
        return run_trials(storage, settings, objective, watch=watch)
    with WorkerProcesses(storage, workers.command(storage.folder, settings), workers.count - 1) as others:
        return run_trials(storage, settings, objective, shared=True, watch=watch, check=others.check)


def join(
    loaded: LoadedModel,
    task: Task,
    storage: StudyStorage,
    *,
    batch_size: int = Settings.batch_size,
    prompt_bytes: int | None = Settings.prompt_bytes,
    watch: Watch = SILENT,
) -> optuna.Study:
    """Work on a study until its trials are done; what is searched follows from the study itself.

    Args:
        loaded: the study's model; the same checkpoint and precision.
        task: the study's task; the same samples.
        batch_size, prompt_bytes: as in `Settings`; each worker has its own.

    Raises:
        UserError: the study is not begun, or is one of another model or task.
    """
    meta = stored_meta(storage)
    noted = _settings(meta, *read_goal(storage))
    settings = replace(noted, batch_size=batch_size, prompt_bytes=prompt_bytes)
    claim_study(storage, _meta_here(meta, loaded, task, settings))
    prepared = Prepared.make(loaded, task, read_evidence(storage), settings, watch)
    budget = prepared.budget(meta.budget, meta.read_budget)
    objective = prepared.objective(storage.folder, settings.space, budget)
    return run_trials(storage, settings, objective, shared=True, watch=watch, check=parent_check())


def _settings(meta: StudyMeta, trials: int, prune: bool) -> Settings:
    """The settings that a study was begun with, as far as its trials depend on them."""
    return Settings(
        read_budget=meta.read_budget,
        trials=trials,
        refine=0,
        samples=meta.samples,
        seed=meta.seed,
        prune=prune,
        objective=meta.objective,
        sampler=meta.sampler,
        split=meta.split,
        max_new_tokens=meta.max_new_tokens,
        space=Space.of(meta.space),
    )


def _meta_here(meta: StudyMeta, loaded: LoadedModel, task: Task, settings: Settings) -> StudyMeta:
    """The study as this worker would search it; the model may be elsewhere on this machine."""
    if loaded.source != meta.model and not loaded.revision:
        raise UserError(f"{loaded.source} cannot be told to be {meta.model}, which the study is of")
    here = study_meta(loaded, task, meta.run_hash, meta.budget, settings)
    return here.model_copy(update={"model": meta.model, "space": meta.space})


@dataclass
class _Process:
    popen: subprocess.Popen[bytes]
    errors: IO[bytes]
    deaths: int = 0


class WorkerProcesses:
    """Starts `count` processes that work on a study, watches them, and stops them on leaving.

    `command` joins the study of `storage` (it ends in `run_trials` with `shared`) and leaves when the
    study is done. A worker that was killed is replaced, and the trial that it ran is queued again;
    one that says why it cannot work, or is killed time and again before it finishes a trial, stops
    the study. Workers do not get the Ctrl-C of the terminal: the process that started them stops
    them, and they stop by themselves when it is gone.

    Raises:
        UserError: from `check`, with what the worker said.
    """

    def __init__(self, storage: StudyStorage, command: Sequence[str], count: int) -> None:
        self._storage = storage
        self._command = list(command)
        self._count = count
        self._environment = {**os.environ, **storage.secrets(), PARENT: str(os.getpid())}
        if "OMP_NUM_THREADS" not in os.environ or OWN_THREADS in os.environ:
            self._environment["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // (count + 1), 1))
        self._started: list[_Process] = []

    @property
    def processes(self) -> list[int]:
        """Ids of the processes that were started last."""
        return [worker.popen.pid for worker in self._started]

    def __enter__(self) -> WorkerProcesses:
        self._started = [self._start() for _ in range(self._count)]
        return self

    def check(self, study: optuna.Study) -> None:
        """Replace workers that died, and queue their trials again."""
        for index, worker in enumerate(self._started):
            code = worker.popen.poll()
            if not code:
                continue
            last_words = _last_line(worker.errors)
            if code == USER_ERROR:
                raise UserError(f"a worker stopped: {last_words.removeprefix(_PREFIX)}")
            self._give_up(study, worker.popen.pid)
            done = trials_in(study, TrialState.COMPLETE)
            lived = any(runs(trial, worker.popen.pid) for trial in done)
            deaths = 1 if lived else worker.deaths + 1
            if deaths > RESTARTS:
                raise UserError(
                    f"a worker died {deaths} times in a row without finishing a trial ({_cause(code)}"
                    f"{': ' + last_words if last_words else ''}); the same command resumes, "
                    "with fewer workers it needs less memory"
                )
            worker.errors.close()
            self._started[index] = self._start(deaths)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # a finished study gives them nothing more to do, an unfinished one queues their trials again
        until = time.monotonic() + STOP_SECONDS
        for worker in self._started:
            worker.popen.terminate()
        for worker in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.popen.wait(max(until - time.monotonic(), 0))
            worker.popen.kill()
            worker.popen.wait()
            worker.errors.close()

    def _start(self, deaths: int = 0) -> _Process:
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=self._environment,
            start_new_session=True,
        )
        return _Process(process, errors, deaths)

    def _give_up(self, study: optuna.Study, process: int) -> None:
        with self._storage.locked():
            for trial in trials_in(study, TrialState.RUNNING):
                if runs(trial, process):
                    give_up(study, trial)


def parent_check() -> Check | None:
    """For a worker that `WorkerProcesses` started: stops it when the starter is gone."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return None

    def check(study: optuna.Study) -> None:
        if os.getppid() != int(parent):
            raise UserError("the process that started this worker is gone; the same command resumes")

    return check


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
