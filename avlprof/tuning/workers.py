"""Who works on a study: this process, others that it starts, and joining one that was begun."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from avlprof.errors import UserError
from avlprof.evaluation import AnswerStore
from avlprof.models import LoadedModel
from avlprof.tasks import Task
from avlprof.tuning.candidate import Budget, noted_starts
from avlprof.tuning.evidence import read_evidence
from avlprof.tuning.objective import Objective, Points, Scores
from avlprof.tuning.prepared import Generated, Progress, forced_answers
from avlprof.tuning.settings import Settings
from avlprof.tuning.space import Space
from avlprof.tuning.storages._base import Place, give_up, runs
from avlprof.tuning.study import StudyMeta, claim_study, find_place, place_meta, sample_hash
from avlprof.tuning.trials import asked_of, note_asked, run_trials

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


def join(loaded: LoadedModel, task: Task, place: Place, *, progress: Progress | None = None) -> optuna.Study:
    """Work on a study until its trials are done; what is searched follows from the study itself.

    Args:
        loaded: the study's model; the same checkpoint and precision.
        task: the study's task; the same samples.

    Raises:
        UserError: the study is not begun, or is one of another model or task.
    """
    meta, trials, prune = place_meta(place), *asked_of(place)
    samples = task.samples(meta.split, meta.samples)
    claim_study(place, _asked(meta, loaded, task, sample_hash(samples)))
    evidence = read_evidence(place)
    tell = progress or (lambda phase, done, total: None)
    space = _space(meta)
    forced = forced_answers(loaded, samples, meta.max_new_tokens, meta.objective, space.scorers, progress)
    steps = max(round(forced.answer_tokens), 1)
    budget = Budget(meta.budget, meta.read_budget, tuple(forced.shapes), steps)
    space = space.within(budget, evidence.layers).supported(evidence)
    space = replace(space, warm=noted_starts(place.folder, ()))
    scores: Scores = forced
    if meta.objective == "accuracy":
        lengths = {name: shape.total for name, shape in zip(forced.samples, forced.shapes, strict=True)}
        store = AnswerStore(place.folder / "answers")
        scores = Generated(loaded, task, samples, meta.max_new_tokens, lengths, store)
    settings = Settings(
        budget=meta.budget,
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
    )
    return run_trials(
        place.folder,
        settings,
        space,
        Objective(scores, evidence, budget, space, meta.objective),
        progress=lambda d, t: tell("trials", d, t),
        place=place,
        shared=True,
        watch=watch_parent(),
    )


def _asked(meta: StudyMeta, loaded: LoadedModel, task: Task, asked: str) -> StudyMeta:
    """The study as this worker would search it."""
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    if loaded.source != meta.model and not loaded.revision:
        raise UserError(f"{loaded.source} cannot be told to be {meta.model}, which the study is of")
    return meta.model_copy(
        update={
            "model_hash": loaded.revision or "",
            "task": task.name,
            "sample_hash": asked,
            "dtype": dtype,
        }
    )


def _space(meta: StudyMeta) -> Space:
    """The space that `Space.described` told of."""
    usual = Space()
    values: dict[str, Any] = {
        name: held[0] if isinstance(getattr(usual, name), str) else held for name, held in meta.space.items()
    }
    known = {field.name for field in fields(Space)}
    return Space(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True)
class Crew:
    """How many processes work on a study, this one included, and how the others find model and task.

    `storage` is the URL of a PostgreSQL database for the trials, by default a journal in the
    study's folder. The other fields are what this process loaded its model and task by.

    Raises:
        UserError: less than one worker.
    """

    workers: int = 1
    storage: str | None = None
    model: str = "tiny"
    task: str = "shapes"
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"workers must be 1 or more, got {self.workers}")

    def place(self, folder: Path) -> Place:
        """Where the trials of a study are."""
        return find_place(folder, self.storage)

    def command(self, folder: Path) -> list[str]:
        """What starts a further worker of a study on this machine."""
        words = [sys.executable, "-m", "avlprof", "studies", "join", str(folder)]
        words += ["--model", self.model, "--task", self.task, "--device", self.device, "--dtype", self.dtype]
        words += ["--revision", self.revision] if self.revision else []
        return words + (["--trust-remote-code"] if self.trust_remote_code else [])

    def run(
        self,
        place: Place,
        settings: Settings,
        space: Points,
        objective: Objective,
        *,
        progress: Callable[[int, int], None] | None = None,
        on_trial: Callable[[optuna.Study, FrozenTrial], None] | None = None,
    ) -> optuna.Study:
        """Run a study until all its trials are done; see `run_trials`."""

        def run(watch: Callable[[optuna.Study], None] | None) -> optuna.Study:
            return run_trials(
                place.folder,
                settings,
                space,
                objective,
                progress=progress,
                on_trial=on_trial,
                place=place,
                shared=self.workers > 1,
                watch=watch,
            )

        note_asked(place, settings)
        if self.workers == 1:
            return run(None)
        with Workers(place, self.command(place.folder), self.workers - 1) as others:
            return run(others.watch)
