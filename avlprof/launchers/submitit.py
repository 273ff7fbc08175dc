"""Workers as jobs of SLURM, by submitit (https://github.com/facebookincubator/submitit)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from avlprof.errors import UserError
from avlprof.launchers._base import Job, Launcher, Started, run_python


@dataclass(frozen=True)
class Submitit(Launcher):
    """A job each. Jobs that wait in the queue join when they start; the others do not wait for them.

    Submitit keeps jobs and their results as pickles in the scratch folder, which nobody else may
    enter; secrets go by the environment, which `sbatch` hands on.

    Attributes:
        arguments: parameters of submitit: `cluster` (`slurm`, `local`; by default SLURM where there is
            one), `timeout_min`, `mem_gb`, `cpus_per_task`, `gpus_per_node`, `slurm_partition`, ...
    """

    passes_on: ClassVar[bool] = True
    arguments: Mapping[str, Any]

    @contextlib.contextmanager
    def session(self, scratch: Path) -> Iterator[Callable[[Job], Started]]:
        try:
            import submitit
        except ImportError:
            raise UserError("launcher 'submitit' needs submitit; pip install 'avlprof[submitit]'") from None
        parameters = {"name": "avlprof", **self.arguments}
        cluster = parameters.pop("cluster", None)
        scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            executor = submitit.AutoExecutor(scratch.resolve(), cluster)
            executor.update_parameters(**parameters)
        except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"submitit refuses --launcher-args: {reason[:400]}") from None

        def start(job: Job) -> Submitted:
            # a job that is submitted from within another one must not look like a part of it
            with submitit.helpers.clean_env(), _environment(job.secrets):
                return Submitted(executor.submit(run_python, replace(job, secrets={})))

        yield start


class Submitted(Started):
    """A job that waits, runs or has ended."""

    def __init__(self, job: Any) -> None:
        self._job = job
        self._outcome: tuple[int, str] | None = None

    def code(self) -> int | None:
        if self._outcome is None and self._job.done():
            try:
                self._outcome = self._job.result()
            except Exception as error:  # of submitit, or what it unpickled
                said = [line for line in str(error).splitlines() if line.strip(" -")]
                self._outcome = (1, f"job {self._job.job_id}: {said[0].strip() if said else type(error)}")
        return None if self._outcome is None else self._outcome[0]

    def last_words(self) -> str:
        return "" if self._outcome is None else self._outcome[1]

    def stop(self) -> None:
        if self._outcome is None:
            self._job.cancel(check=False)

    def end(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.code() is None and time.monotonic() < until:
            time.sleep(0.1)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables of this process, inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
