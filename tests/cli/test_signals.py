"""Signals end a command once, after what is in hand has been written; one writer a folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from avlprof.cli._app import app
from avlprof.cli._signals import Signalled, ending_once
from avlprof.locks import FolderLock, uninterrupted
from avlprof.runs import RunDirectory
from tests.helpers import ROOT

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.parametrize("number", CODES)
def test_a_signal_is_raised_once(number):
    def work():
        try:
            os.kill(os.getpid(), number)
        finally:
            for again in CODES:
                os.kill(os.getpid(), again)
            time.sleep(0.01)

    with pytest.raises(Signalled) as error, ending_once():
        work()
    assert error.value.code == CODES[number]


class Dying:
    """A signal comes while it is finalised."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


def test_a_signal_that_python_would_swallow_comes_again():
    hook, done = sys.unraisablehook, []

    def work():
        Dying()
        done.append(True)  # Python has let no exception out
        time.sleep(5.0)

    with pytest.raises(Signalled) as error, ending_once():
        work()
    assert done and error.value.code == 143
    assert sys.unraisablehook is hook


def test_handlers_are_put_back_and_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_once():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_uninterrupted_is_finished_first():
    done = []

    def work():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            done.append(True)

    with pytest.raises(KeyboardInterrupt), uninterrupted():
        work()
    assert len(done) == 3 and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def begun(folder):
    """A trace of many samples at work, behind its first sample."""
    words = ["trace", "--task", "shapes:describe", "-n", "400", "-o", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "avlprof", *words],
        cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    until = time.monotonic() + 100
    while not (folder / "meta.json").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(3.0)
    return process


@pytest.mark.slow  # three processes that load the model
@pytest.mark.parametrize("number", CODES)
def test_two_signals_in_a_row_lose_nothing(tmp_path, number):
    process = begun(tmp_path / "run")
    process.send_signal(number)
    for _ in range(5):
        time.sleep(0.004)
        if process.poll() is None:
            process.send_signal(number)
    assert process.wait(60) == CODES[number]
    assert b"the same command resumes" in process.stderr.read()
    process.stderr.close()
    assert len(RunDirectory(tmp_path / "run").ids()) > 0


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_a_folder_that_is_written_to_is_refused_before_the_model_is_loaded(tmp_path, command):
    with FolderLock(tmp_path / "parts"):
        more = ["--budget", "0.5"] if command == "compare" else ["--policy", "h2o"]
        done = CliRunner().invoke(app, [command, "-n", "1", "-o", str(tmp_path), *more])
    assert done.exit_code == 2, done.output
    assert "another process is writing to" in done.output
