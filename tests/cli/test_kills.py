"""A campaign of `kill -9` at random moments: the same command goes on, and ends as an uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from optuna.trial import TrialState
from safetensors.numpy import load_file

import avlprof
from avlprof.cli import main
from avlprof.policy import load_policy
from avlprof.run import Run
from avlprof.tracing.options import TraceSettings
from avlprof.tuning import read_study
from tests.cli_runner import invoke
from tests.helpers import settle_threads
from tests.search_space import outcome

TASK, LIMIT = "shapes:read", 4
SEARCH = ("--trials", 4, "-n", 2, "--proof-samples", 2, "--refine", 0)


@dataclass(frozen=True)
class Command:
    """A command that writes into the folder `{out}`, and what of it must be the same after kills."""

    words: tuple[Any, ...]
    result: Callable[[Path], Any]

    def arguments(self, out: Path, run: Path) -> list[str]:
        known = {"{out}": out, "{run}": run}
        whole = (*self.words, "--task", TASK, "--max-new-tokens", LIMIT, "--device", "cpu", "--out", "{out}")
        return [str(known.get(word, word)) for word in whole]


def traced(folder):
    """Each sample once, in every table and with all its scores."""
    run = Run.open(folder)
    samples = run.samples()
    assert samples["sample"].is_unique
    stats = run.directory.stats()
    keys = ["sample", "layer", "phase", "query"]
    assert not stats.duplicated(keys).any()
    names = sorted(samples["sample"])
    scores = {name: run.scores(name, ["last", "decode"]) for name in names}
    return (
        samples.drop(columns="seconds").sort_values("sample").to_json(orient="records"),
        stats.sort_values(keys).to_json(orient="records"),
        {name: {kind: array.tolist() for kind, array in found.items()} for name, found in scores.items()},
    )


def searched(folder):
    """Each trial once: those of a killed process failed, and were run again."""
    study = read_study(folder)
    states = {trial.state for trial in study.get_trials()}
    assert states <= {TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED}
    policy = load_policy(folder / "policy.yaml")
    return outcome(study), policy.hash, policy.provenance.scores


def swept(folder):
    return [searched(study.parent) for study in sorted(folder.glob("*/study.json"))]


def compared(folder):
    """Each answer once, whichever process gave it."""
    answers = pd.concat([pd.read_parquet(part) for part in (folder / "parts").glob("part-*.parquet")])
    keys = ["policy_hash", "sample"]
    assert not answers.duplicated(keys).any()
    table = pd.read_parquet(folder / "answers.parquet"), pd.read_csv(folder / "compare.csv")
    return [frame.to_json(orient="records") for frame in (answers.sort_values(keys), *table)]


COMMANDS = {
    "trace": Command(("trace", "-n", 6), traced),
    "tune": Command(("tune", "--run", "{run}", "--budget", 0.4, *SEARCH), searched),
    "compare": Command(
        ("compare", "-n", 3, "--budget", "0.3,0.5", "--baseline", "uniform", "--baseline", "h2o"), compared
    ),
    "sweep": Command(("tune", "--run", "{run}", "--budgets", "0.3,0.5", *SEARCH), swept),
}


def start(arguments, said):
    """A process that runs a command, and ends with it."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        settle_threads()
        sys.stdout = sys.stderr = said.open("a", buffering=1)
        sys.argv = ["avlprof", *arguments]
        main()
        status = 0
    except SystemExit as left:
        status = left.code or 0
    finally:
        os._exit(status)


def ended(process, seconds):
    """How a process ended within so many seconds; None where it still runs."""
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.002)


def readable(folder):
    """Every file that a reader may open can be read; hidden ones are what a process had begun."""
    readers = {
        ".parquet": pd.read_parquet,
        ".safetensors": load_file,
        ".json": lambda path: json.loads(path.read_text()),
        ".yaml": lambda path: yaml.safe_load(path.read_text()),
        ".csv": pd.read_csv,
    }
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and path.suffix in readers and not hidden:
            readers[path.suffix](path)


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A run for the searches, and a folder to stand in."""
    monkeypatch.chdir(tmp_path)
    run = avlprof.trace("tiny", TASK, 2, TraceSettings(max_new_tokens=LIMIT), out=tmp_path / "run")
    return run.path


def campaign(name, kills, run, folder):
    """Kill a command so many times, each at a random moment; whenever one ends, look at what it wrote."""
    command, said, moments = COMMANDS[name], folder / f"{name}.txt", random.Random(name)
    began = time.monotonic()
    # in this process, so that those to come find all modules in place
    result = invoke(*command.arguments(folder / name, run))
    assert result.exit_code == 0, result.output
    whole = time.monotonic() - began
    wanted = command.result(folder / name)
    done, number = 0, 0
    while done < kills:
        out = folder / f"{name}-{number}"
        number += 1
        status = -1
        while status != 0:
            process = start(command.arguments(out, run), said)
            # the last one of a campaign is let through
            status = ended(process, moments.uniform(0.0, whole) if done < kills else 300)
            if status is None:
                os.kill(process, signal.SIGKILL)
                status = ended(process, 60)
                done += status == -signal.SIGKILL
            assert status in (0, -signal.SIGKILL), said.read_text()
            readable(out)
        assert command.result(out) == wanted
    assert "Traceback" not in said.read_text()
    return done


@pytest.mark.full  # processes that are killed
@pytest.mark.parametrize(("name", "kills"), [("trace", 6), ("compare", 2), ("tune", 2)])
def test_ten_kills(name, kills, begun, tmp_path):
    assert campaign(name, kills, begun, tmp_path) == kills


@pytest.mark.slow  # a hundred processes that are killed, and as many that go on
@pytest.mark.parametrize(("name", "kills"), [("trace", 30), ("compare", 30), ("tune", 25), ("sweep", 15)])
def test_a_hundred_kills(name, kills, begun, tmp_path):
    assert campaign(name, kills, begun, tmp_path) == kills
