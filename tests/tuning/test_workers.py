"""Workers: exact counts in any interleaving, deaths at any moment, and who tells of it."""

from __future__ import annotations

import os
import signal
import threading
import time

import optuna
import pytest
from optuna.trial import TrialState

from avlprof.errors import UserError
from avlprof.tuning import Settings
from avlprof.tuning.storages._base import give_up, retry
from avlprof.tuning.storages.journal import JOURNAL, FolderStorage, journal, mend
from avlprof.tuning.trials import run_trials
from avlprof.tuning.workers import crew_check
from tests.fake_study import (
    Sleepy,
    Starts,
    check_complete,
    check_replacement,
    command,
    crew_of,
    stop_midway,
    work,
)
from tests.helpers import ROOT
from tests.watching import Notes


class Killed(BaseException):
    """Stops a trial as SIGKILL does: Optuna does not get to mark it."""


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def processes(crew):
    """Ids of the processes that were started last."""
    return [started.popen.pid for started in crew.started]


def gone(process):
    """Whether a process ended within a few seconds."""
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.full  # three processes, one of them killed
def test_kill_9_of_one_of_three_loses_and_repeats_no_trial(tmp_path):
    trials, killed = 12, []

    def check(study):
        if not killed:
            first, second = zip(processes(crew), crew.names, strict=True)
            killed.append((first[1], stop_midway(study, first[0], name=first[1])))
            stop_midway(study, second[0], signal.SIGCONT, second[1])
        crew_check(storage, crew)(study)

    storage = FolderStorage(tmp_path)
    with crew_of(storage, command(tmp_path, trials, 0.4), 3) as crew:
        study = work(tmp_path, trials, 0.1, check=check)
        assert killed[0][0] not in crew.names
    lost = check_complete(study, trials)
    assert [trial.number for trial in lost] == [killed[0][1]]
    assert len(study.trials) == trials + 1
    done = study.get_trials(states=(TrialState.COMPLETE,))
    assert len({trial.user_attrs["worker"] for trial in done}) >= 2
    assert all(gone(process) for process in processes(crew))


@pytest.mark.parametrize("trials", [1, 3, 9, 30])
def test_several_workers_never_run_one_too_many(tmp_path, trials):
    notes, errors = Notes(), []

    def run():
        try:
            work(tmp_path, trials, watch=notes)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    study = FolderStorage(tmp_path).open()
    assert len(study.trials) == trials
    assert notes.counts("trials").count((trials, trials)) == 4
    if trials >= 6:
        assert check_complete(study, trials) == []


@pytest.mark.parametrize("moment", ["asked", "begun", "scored"])
def test_a_trial_of_a_dead_worker_is_run_again_whenever_it_died(tmp_path, moment):
    storage = FolderStorage(tmp_path)
    study = storage.open()
    with storage.join(True) as me, storage.locked():
        study.enqueue_trial(Starts().starts()[0].params(None))
        trial = study.ask()
        if moment != "asked":
            storage.begin(trial, me)
        if moment == "scored":
            trial.suggest_float("x", 0.0, 1.0)
            trial.report(1.0, 0)
    study = work(tmp_path, 8)
    assert [trial.number for trial in check_complete(study, 8)] == [0]
    assert study.trials[1].params == Starts().starts()[0].params(None)


def test_a_trial_of_a_live_worker_is_left_alone(tmp_path):
    storage = FolderStorage(tmp_path)
    study = storage.open()
    with storage.join(True) as me:
        with storage.locked():
            trial = study.ask()
            storage.begin(trial, me)
        assert storage.busy(study)
        assert storage.lost(study) == []
    assert not storage.busy(study)
    assert [lost.number for lost in storage.lost(study)] == [0]


def test_a_worker_that_finishes_and_leaves_while_it_is_looked_for_is_not_lost(tmp_path, monkeypatch):
    storage = FolderStorage(tmp_path)
    study = storage.open()
    with storage.join(True) as me:
        trial = study.ask()
        storage.begin(trial, me)

        def leaves(self, worker):
            assert worker == me
            study.tell(trial, 1.0)
            return False

        monkeypatch.setattr(FolderStorage, "_is_alive", leaves)
        assert storage.lost(study) == []
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE]


def test_a_trial_is_queued_again_once(tmp_path):
    study = FolderStorage(tmp_path).open()
    for attempt in range(3):
        trial = study.ask()
        x = trial.suggest_float("x", 0.0, 1.0)
        trial.set_user_attr("worker", "me")
        frozen = study.trials[trial.number]
        retry(study, frozen)
        give_up(study, frozen)
        retry(study, study.trials[trial.number])
        waiting = study.get_trials(states=(TrialState.WAITING,))
        assert [(t.params, t.user_attrs) for t in waiting] == [({"x": x}, {})]
        assert waiting[0].system_attrs["retry_history"] == list(range(attempt + 1))


def test_who_was_taken_for_dead_does_not_count(tmp_path):
    """Its trial is given up and run again by another; then it comes back with a score."""
    storage = FolderStorage(tmp_path)
    other = storage.open()

    class Slow(Sleepy):
        def __call__(self, trial):
            value = Sleepy.__call__(self, trial)
            if trial.number == 2:
                give_up(other, other.trials[2])
            return value

    settings = Settings(trials=7, prune=False)
    study = run_trials(storage, settings, Slow())
    lost = check_complete(study, 7)
    assert [trial.number for trial in lost] == [2]
    assert lost[0].value is None


def test_an_error_of_the_score_is_not_mistaken_for_that(tmp_path):
    class Wrong(Sleepy):
        def __call__(self, trial):
            raise ValueError("no such layer")

    with pytest.raises(ValueError, match="no such layer"):
        run_trials(FolderStorage(tmp_path), Settings(trials=3), Wrong())


@pytest.mark.full  # three processes, stopped and started again
def test_ctrl_c_stops_all_workers_and_the_study_goes_on(tmp_path):
    def interrupt(study):
        stop_midway(study, processes(crew)[0], signal.SIGCONT, crew.names[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with crew_of(FolderStorage(tmp_path), command(tmp_path, 40, 1.0), 2) as crew:
            work(tmp_path, 40, 0.1, check=interrupt)
    assert gone(processes(crew)[0])
    lost = check_complete(work(tmp_path, 40), 40)
    assert len(lost) == 1


def test_ctrl_c_in_a_trial_keeps_its_parameters(tmp_path):
    class Interrupted(Sleepy):
        def __call__(self, trial):
            value = Sleepy.__call__(self, trial)
            if trial.number == 9:
                raise KeyboardInterrupt
            return value

    with pytest.raises(KeyboardInterrupt):
        run_trials(FolderStorage(tmp_path), Settings(trials=12), Interrupted(), shared=True)
    assert [trial.number for trial in check_complete(work(tmp_path, 12), 12)] == [9]


@pytest.mark.full  # processes that are killed
def test_workers_leave_when_their_starter_is_killed(tmp_path):
    starter = os.fork()
    if not starter:
        storage = FolderStorage(tmp_path)
        with crew_of(storage, command(tmp_path, 30, 0.5), 2) as crew:
            work(tmp_path, 2, check=crew_check(storage, crew))
            (tmp_path / "pid").write_text(f"{crew.names[0]} {processes(crew)[0]}")
            time.sleep(100)
        os._exit(0)
    until = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    name, process = (tmp_path / "pid").read_text().split()
    worker = int(process)
    study = FolderStorage(tmp_path).open()
    stop_midway(study, worker, signal.SIGCONT, name)
    os.kill(starter, signal.SIGKILL)
    os.waitpid(starter, 0)
    assert gone(worker)
    assert len(study.get_trials(states=(TrialState.COMPLETE,))) < 30
    check_complete(work(tmp_path, 30), 30)


def test_a_dead_worker_is_replaced_and_its_trial_queued_again(tmp_path):
    check_replacement(FolderStorage(tmp_path))


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", r"died 3 times in a row .*\(signal SIGKILL\)"),
        ("raise SystemExit('out of memory')", r"died 3 times in a row .*\(exit code 1: out of memory\)"),
        ("import sys; sys.stderr.write('error: no GPU 7'); sys.exit(2)", "a worker stopped: no GPU 7"),
    ],
)
def test_workers_that_cannot_work_end_the_study_with_an_error(tmp_path, program, said):
    storage = FolderStorage(tmp_path)
    with pytest.raises(UserError, match=said):
        with crew_of(storage, ["-c", program], 3) as crew:
            work(tmp_path, 10_000, 0.05, check=crew_check(storage, crew))
    assert all(gone(process) for process in processes(crew))


def test_a_torn_line_is_cut_off_before_the_next_one_is_written(tmp_path):
    path = tmp_path / JOURNAL
    first, second = (FolderStorage(tmp_path).open() for _ in range(2))
    first.ask()
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"op_code": 4, "text": "' + b"x" * 200_000)
    assert len(second.trials) == 1
    second.ask()
    assert path.read_bytes().startswith(whole)
    assert b"xxx" not in path.read_bytes()
    assert len(first.trials) == len(FolderStorage(tmp_path).open().trials) == 2


@pytest.mark.parametrize("text", [b"", b"a", b"a\n", b"a\nb", b"\n", b"a\n" + b"b" * 65536, b"c" * 70000])
def test_mend_keeps_whole_lines(tmp_path, text):
    path = tmp_path / "file"
    path.write_bytes(text)
    mend(path)
    assert path.read_bytes() == b"".join(line for line in text.splitlines(True) if line.endswith(b"\n"))


def test_a_writer_that_was_killed_with_the_lock_in_hand_blocks_nobody(tmp_path):
    path = tmp_path / JOURNAL
    backend = journal(path)
    child = os.fork()
    if not child:
        backend._lock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    began = time.monotonic()
    journal(path).append_logs([{"op_code": 9}])
    assert time.monotonic() - began < 5


@pytest.mark.full  # four workers
def test_pruning_pairs_samples_across_workers(tmp_path):
    """Stopped trials saw less, and none of them looks better than the best whole one."""

    class Sampled(Sleepy):
        def __call__(self, trial):
            x, kind = trial.suggest_float("x", 0.0, 1.0), trial.suggest_categorical("kind", ("a", "b"))
            seen = []
            for step in range(16):
                trial.report((x - 0.3) ** 2 + (kind == "b") / 10 + step % 5, step)
                seen.append((x - 0.3) ** 2 + (kind == "b") / 10 + step % 5)
                if step == 7 and trial.should_prune():
                    break
            trial.set_user_attr("complete", len(seen) == 16)
            return sum(seen) / len(seen)

    def run():
        run_trials(FolderStorage(tmp_path), Settings(trials=24), Sampled(), shared=True)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    done = FolderStorage(tmp_path).open().get_trials()
    assert [trial.state for trial in done] == [TrialState.COMPLETE] * 24
    cut = [trial for trial in done if not trial.user_attrs["complete"]]
    best = min((trial for trial in done if trial.user_attrs["complete"]), key=lambda t: t.value)
    assert 0 < len(cut) < 24
    for trial in cut:
        same = [best.intermediate_values[step] for step in trial.intermediate_values]
        assert trial.value >= sum(same) / len(same)


def test_optuna_says_nothing(tmp_path, capfd):
    before = optuna.logging.get_verbosity()
    work(tmp_path, 2)
    assert capfd.readouterr().err == ""
    assert optuna.logging.get_verbosity() == before
