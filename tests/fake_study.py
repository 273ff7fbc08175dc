"""A study that needs no model: a start list, a score that takes its time, and a worker's command."""

from __future__ import annotations

import os
import platform
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from avlprof.launchers import Launch
from avlprof.tuning import Settings
from avlprof.tuning.storages._base import runs
from avlprof.tuning.storages.journal import FolderStorage
from avlprof.tuning.storages.postgres import PostgresStorage
from avlprof.tuning.trials import run_trials
from avlprof.tuning.workers import crew_check, parent_check, study_crew
from avlprof.watch import SILENT

STEPS = 4
HEARTBEAT, GRACE = 1, 3


@dataclass(frozen=True)
class Start:
    x: float
    kind: str

    def params(self, budget):
        return {"x": self.x, "kind": self.kind}


class Starts:
    """As much of a `Space` as the trials ask for."""

    def starts(self):
        return [Start(x, kind) for kind in ("a", "b") for x in (0.0, 0.5, 1.0)]


class OneByOne:
    """As much of an `Objective` as a plain call with a trial gives."""

    def suggest(self, trial):
        return None

    def score(self, batch, halve=False, before=()):
        for trial, _ in batch:
            yield trial, self(trial)


@dataclass
class Sleepy(OneByOne):
    """A paraboloid that takes `pause` seconds."""

    pause: float = 0.0
    budget: None = None
    space: Starts = field(default_factory=Starts)

    def __call__(self, trial):
        x = trial.suggest_float("x", 0.0, 1.0)
        kind = trial.suggest_categorical("kind", ("a", "b"))
        value = (x - 0.3) ** 2 + (kind == "b") / 10
        for step in range(STEPS):
            trial.report(value, step)
            time.sleep(self.pause / STEPS)
        trial.set_user_attr("complete", True)
        return value


def storage_of(folder, url=""):
    return PostgresStorage(Path(folder), url, HEARTBEAT, GRACE) if url else FolderStorage(Path(folder))


def work(folder, trials, pause=0.0, url="", check=None, watch=SILENT, halving=1):
    """What a worker does."""
    Path(folder).mkdir(exist_ok=True)
    return run_trials(
        storage_of(folder, url),
        Settings(trials=int(trials), prune=False, halving=halving),
        Sleepy(float(pause)),
        shared=True,
        watch=watch,
        check=check or parent_check(),
    )


def command(folder, trials, pause, url=""):
    """The command of a worker, behind `python`."""
    return ["-m", "tests.fake_study", str(folder), str(trials), str(pause), url]


def crew_of(storage, words, workers):
    """Workers of this machine beside this process."""
    return study_crew(storage, words, Launch(workers))


def stop_midway(study, process, how=signal.SIGKILL, name=""):
    """Stop a worker of this machine in the middle of a trial; returns the number of the trial."""
    name = name or re.sub(r"[^\w.-]", "-", f"{platform.node()}-{process}")
    until = time.monotonic() + 90
    while time.monotonic() < until:
        os.kill(process, signal.SIGSTOP)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if runs(trial, name) and trial.intermediate_values:
                os.kill(process, how)
                return trial.number
        os.kill(process, signal.SIGCONT)
        time.sleep(0.1)
    raise AssertionError(f"process {process} runs no trial")


def check_replacement(storage):
    """A worker that is killed: another one in its stead, and its trial waits with the same parameters."""
    study = storage.open()
    with crew_of(storage, ["-c", "import time; time.sleep(100)"], 3) as crew:
        first, second = crew.names
        trials = []
        for name in (first, second):
            trials.append(study.ask({"x": FloatDistribution(0.0, 1.0)}))
            trials[-1].set_user_attr("worker", f"{name}-abc")
        os.kill(crew.started[0].popen.pid, signal.SIGKILL)
        while crew.names[0] == first:
            crew_check(storage, crew)(study)
        assert crew.names[1] == second
        assert study.trials[0].state == TrialState.FAIL
        assert study.trials[1].state == TrialState.RUNNING
        assert [trial.params for trial in study.trials[2:]] == [trials[0].params]
        assert study.trials[2].state == TrialState.WAITING


def check_complete(study, trials):
    """Exactly so many trials count, nothing is left open, and no start or lost trial is missing or double."""
    done = study.get_trials(states=(TrialState.COMPLETE,))
    assert len(done) == trials
    assert study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING)) == []
    seen = Counter((trial.params["x"], trial.params["kind"]) for trial in done)
    for start in Starts().starts():
        assert seen[start.x, start.kind] == 1
    assert max(seen.values()) == 1
    lost = study.get_trials(states=(TrialState.FAIL,))
    for trial in lost:
        again = [
            t for t in study.get_trials() if t.system_attrs.get("retry_history", [])[-1:] == [trial.number]
        ]
        assert len(again) == 1
        assert trial.params.items() <= again[0].params.items()
        assert seen[again[0].params["x"], again[0].params["kind"]] == 1
    return lost


if __name__ == "__main__":
    work(*sys.argv[1:])
