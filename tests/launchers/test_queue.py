"""Tasks in a folder: each is done, by one worker at a time, whoever is lost; and what launchers refuse."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time

import pytest

from avlprof.errors import UserError
from avlprof.launchers import LAUNCHERS, WORKER, Crew, Launch, queue
from avlprof.launchers._base import Job, run_python
from avlprof.launchers.queue import LEADER, Queue, Team
from tests.cli_runner import invoke, refused
from tests.fake_launcher import threads
from tests.helpers import ROOT

SERVE = """
import os, sys, time
from pathlib import Path
from avlprof.launchers.queue import Queue
for taken in Queue(Path(sys.argv[1])).tasks(os.environ["AVLPROF_WORKER"]):
    number = taken.read()["number"]
    time.sleep(0.05)
    with open(Path(sys.argv[2]) / f"{number}", "a") as file:
        file.write(os.environ["AVLPROF_WORKER"] + "\\n")
    taken.done()
"""
"""A worker that notes whose task it was, after a while."""


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(queue, "POLL_SECONDS", 0.01)


def test_each_task_is_taken_once_in_any_interleaving(tmp_path):
    tasks, taken, errors = Queue(tmp_path / "queue"), [], []
    with tasks.led():
        numbers = list(range(150))
        for number in random.sample(numbers, len(numbers)):
            tasks.put(f"{number:03d}", {"number": number})

        def take(worker):
            try:
                while (one := tasks.take(worker)) is not None:
                    taken.append((one.name, one.read()["number"]))
                    one.done()
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=take, args=(f"w{number}",)) for number in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert tasks.left() == set()
    assert errors == []
    assert sorted(taken) == [(f"{number:03d}", number) for number in numbers]
    assert not tasks.path.exists()


def test_what_a_lost_worker_had_in_hand_goes_to_others(tmp_path):
    tasks = Queue(tmp_path)
    with tasks.led():
        for name in "abc":
            tasks.put(name, {})
        for worker, name in (("w1", "a"), ("w10", "b"), ("w1", "c")):
            assert tasks.take(worker).name == name
        assert tasks.take("w2") is None
        assert tasks.left() == {"a", "b", "c"}
        tasks.give_back("w1")
        tasks.give_back("w3")
        assert [tasks.take("w2").name, tasks.take("w2").name, tasks.take("w2")] == ["a", "c", None]
        assert tasks.left() == {"a", "b", "c"}


def test_workers_leave_when_who_leads_is_silent_or_gone(tmp_path, monkeypatch):
    tasks = Queue(tmp_path / "queue")
    with tasks.led():
        tasks.put("a", {})
        monkeypatch.setattr(queue, "SILENT_SECONDS", 0.3)
        seen, began = [], time.monotonic()
        for taken in tasks.tasks("w1"):
            seen.append(taken.name)
            taken.done()
        assert seen == ["a"]
        assert 0.3 <= time.monotonic() - began < 5
        assert tasks.served("w1")
        assert not tasks.served("w2")
    monkeypatch.setattr(queue, "SILENT_SECONDS", 60)
    assert list(tasks.tasks("w1")) == []


@pytest.mark.parametrize("losing", [0, 1, 3])
def test_a_team_does_all_tasks_whoever_is_lost(tmp_path, monkeypatch, losing):
    done, left = [], []

    def work(tasks, worker):
        for taken in tasks.tasks(worker):
            done.append(taken.read()["number"])
            taken.done()

    def serve(name, look):
        time.sleep(0.02)
        look()
        done.append(int(name))

    def tell(names):
        left.append(len(names))
        time.sleep(0.005)

    tasks = {f"{number:03d}": {"number": number} for number in range(40)}
    with threads(monkeypatch, work, losing) as begun:
        with Team(Launch(4, "threads"), tmp_path, lambda path: ["-m", "x", str(path)]) as team:
            team.work(tasks, serve, tell)
            assert sorted(done) == list(range(40))
    assert left[-1] == 0
    assert left == sorted(left, reverse=True)
    assert len(begun) >= 3
    assert [one.code() for one in begun[:losing]].count(-9) <= losing
    assert [path.name for path in (tmp_path / ".team").iterdir()] == [".lock"]


def test_a_folder_has_one_team_at_a_time(tmp_path, monkeypatch):
    with threads(monkeypatch, lambda tasks, worker: None):
        launch, words = Launch(2, "threads"), lambda path: ["-m", "x", str(path)]
        with Team(launch, tmp_path, words):
            with pytest.raises(UserError, match="another process is writing"):
                Team(launch, tmp_path, words).__enter__()
        Team(launch, tmp_path, words).__enter__().__exit__()


@pytest.mark.full  # processes, one of them killed
def test_a_process_that_is_killed_is_replaced_and_its_task_is_done(tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    killed = []

    def serve(name, look):
        time.sleep(0.05)
        (notes / str(int(name))).write_text("leader\n")

    def tell(names):
        until = time.monotonic() + 60
        while not killed:  # who leads begins when the other one has a task in hand
            assert time.monotonic() < until
            if list((tmp_path / ".team").glob("queue-*/taken/*.w1-*")):
                killed.append(team.crew.names[0])
                os.kill(team.crew.started[0].popen.pid, signal.SIGKILL)

    tasks = {f"{number:03d}": {"number": number} for number in range(60)}
    with Team(Launch(2), tmp_path, lambda path: ["-c", SERVE, str(path), str(notes)]) as team:
        team.work(tasks, serve, tell)
        assert team.crew.names != killed
    assert sorted(int(path.name) for path in notes.iterdir()) == list(range(60))


def test_a_worker_that_runs_in_a_process_that_is_there(tmp_path, monkeypatch):
    """As Ray's and submitit's do: folder, variables, exit code and last words are those of a process."""
    (tmp_path / "said.py").write_text(
        "import os, sys\nprint(os.getcwd(), os.environ['A'])\n"
        "sys.stderr.write('one\\nerror: no GPU\\n')\nsys.exit(int(sys.argv[1]))\n"
    )
    for name in ("A", WORKER):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.syspath_prepend(str(tmp_path))
    for code in (0, 2):
        job = Job("w1-a", ("-m", "said", str(code)), {"A": "b"}, folder=tmp_path)
        assert run_python(job) == (code, "error: no GPU")
        assert os.environ["A"] == "b" and os.environ[WORKER] == "w1-a"
    (tmp_path / "wrong.py").write_text("1 / 0\n")
    assert run_python(Job("w1-a", ("-m", "wrong"), folder=tmp_path)) == (
        1,
        "ZeroDivisionError: division by zero",
    )
    code, said = run_python(Job("w1-a", ("-m", "said"), folder=tmp_path / "nowhere"))
    assert code == 2 and "nowhere is not there on" in said


def test_launchers_have_names_and_options():
    assert LAUNCHERS.names()[:3] == ["local", "ray", "submitit"]
    for launch, said in (
        (("local", {"x": 1}), "launcher 'local' takes no options, got 'x'"),
        (("ray", {"num_gpu": 1}), "unknown option of launcher 'ray' 'num_gpu'; did you mean num_gpus"),
        (("ray", {"num_cpus": "many"}), "option num_cpus of launcher 'ray' must be float"),
        (("slurm", None), "unknown launcher 'slurm'; known: local, ray, submitit"),
    ):
        with pytest.raises(UserError, match=said):
            Launch(2, *launch)
    with pytest.raises(UserError, match="workers must be 1 or more, got 0"):
        Launch(0)


def test_a_crew_that_cannot_begin_leaves_nothing(tmp_path, monkeypatch):
    begun = []
    with threads(monkeypatch, lambda tasks, worker: begun.append(worker)):

        def jobs(number):
            if number == 2:
                raise UserError("no second one")
            return ["-m", "x", str(tmp_path)], {}

        with pytest.raises(UserError, match="no second one"):
            Crew(Launch(3, "threads"), jobs, tmp_path / "scratch").__enter__()
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("command", ["trace", "evaluate", "compare", "tune"])
def test_the_same_options_of_all_commands(command):
    assert "launcher 'local' takes no options" in refused(invoke(command, "--launcher-args", "a=1"))
    said = refused(invoke(command, "--workers", "2", "--launcher", "rya"))
    assert said == "unknown launcher 'rya'; did you mean ray?"
    assert "--launcher-args must be NAME=VALUE" in refused(invoke(command, "--launcher-args", "a"))


def test_only_launchers_start_a_join(tmp_path, monkeypatch):
    assert "give --workers to evaluate or compare" in refused(invoke("join", tmp_path))
    monkeypatch.setenv(WORKER, "w1-a")
    assert invoke("join", tmp_path / "gone").exit_code == 0
    assert "│ join " not in invoke("--help").output


def test_tasks_are_plain_json(tmp_path):
    tasks = Queue(tmp_path)
    with tasks.led():
        tasks.put("a", {"x": [1, None, "é"]})
        taken = tasks.take(LEADER)
        assert json.loads(taken.path.read_text("utf-8")) == taken.read() == {"x": [1, None, "é"]}
        taken.done()
        taken.done()
        assert taken.read() is None
