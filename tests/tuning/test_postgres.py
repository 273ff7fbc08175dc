"""Studies in a real PostgreSQL: workers that die, hang or never gave a sign of life; whose study it is."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from avlprof.allocators import Evidence
from avlprof.errors import UserError
from avlprof.tuning import StudyMeta, read_study
from avlprof.tuning.evidence import dump_evidence, read_evidence, shared_evidence
from avlprof.tuning.storages._base import BATCH
from avlprof.tuning.storages.journal import FolderStorage
from avlprof.tuning.storages.postgres import PostgresStorage, database_url
from avlprof.tuning.study import claim_study, find_storage, stored_meta
from tests.fake_study import (
    GRACE,
    Starts,
    check_complete,
    check_replacement,
    command,
    stop_midway,
    storage_of,
    work,
)
from tests.helpers import ROOT

USERS = ("postgres", "nobody")


def binary(name):
    """A program of PostgreSQL: on the path, or where Debian keeps it."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(debian[-1]) if debian else None)


def reason():
    """Why there can be no server here."""
    if importlib.util.find_spec("psycopg") is None:
        return "psycopg is not installed (pip install 'avlprof[postgres]')"
    if not binary("initdb") or not binary("pg_ctl"):
        return "PostgreSQL is not installed (apt-get install postgresql)"
    if os.getuid() == 0 and not user():
        return f"PostgreSQL does not run as root, and there is no user {' or '.join(USERS)}"
    return ""


def user():
    """An ordinary user to run the server as, when the tests run as root."""
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    return next((known[name] for name in USERS if name in known), None)


pytestmark = [
    pytest.mark.skipif(bool(reason()), reason=reason()),
    pytest.mark.filterwarnings("ignore:Heartbeat of storage"),
]


@pytest.fixture(scope="module")
def server():
    """The URL of a database in a server of our own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="avlprof-pg-") as folder:
        other = user() if os.getuid() == 0 else None
        identity = {} if other is None else {"user": other.pw_uid, "group": other.pw_gid, "extra_groups": []}
        if other is not None:
            os.chown(folder, other.pw_uid, other.pw_gid)

        def run(*arguments):
            # the server inherits what it is given to write to, so a pipe would never end
            with open(Path(folder) / "said.txt", "w+") as said:
                done = subprocess.run(
                    arguments, cwd=folder, stdout=said, stderr=said, timeout=120, check=False, **identity
                )
                said.seek(0)
                assert done.returncode == 0, said.read()

        data = f"{folder}/data"
        run(binary("initdb"), "-D", data, "-U", "tester", "-A", "trust", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c fsync=off -k {folder}"
        run(binary("pg_ctl"), "-D", data, "-w", "-l", f"{folder}/log.txt", "-o", options, "start")
        try:
            yield f"postgresql://tester@127.0.0.1:{port}/postgres"
        finally:
            run(binary("pg_ctl"), "-D", data, "-m", "immediate", "-w", "stop")


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def folder(tmp_path, request):
    """A folder with a name of its own, since studies of a database are told apart by it."""
    return tmp_path / f"{request.node.name}-{os.getpid()}"


def meta(**changed):
    values = {
        "model": "tiny", "model_hash": "a", "task": "shapes", "split": "search", "samples": 4,
        "sample_hash": "b", "max_new_tokens": 6, "dtype": "float32", "budget": 0.2, "read_budget": None,
        "seed": 0, "run_hash": "c", "space": {"allocators": ("uniform",), "refreshes": (0, 8)},
    }  # fmt: skip
    return StudyMeta(**(values | changed))


@pytest.mark.slow  # three processes, and heartbeats to wait for
def test_kill_9_of_one_of_three_is_found_by_its_heartbeat(server, folder):
    """Nobody here watches them; another one hangs for longer than the grace, and comes back."""
    trials = 9
    workers = [subprocess.Popen([sys.executable, *command(folder, trials, 0.6, server)]) for _ in range(2)]
    study = storage_of(folder, server).open()
    numbers = {
        stop_midway(study, workers[0].pid),
        stop_midway(study, workers[1].pid, signal.SIGSTOP),
    }
    threading.Timer(GRACE + 3, os.kill, (workers[1].pid, signal.SIGCONT)).start()
    done = work(folder, trials, 0.6, server)
    assert workers[1].wait(60) == 0
    assert workers[0].wait() == -signal.SIGKILL
    lost = check_complete(done, trials)
    assert {trial.number for trial in lost} == numbers


@pytest.mark.full  # a server of its own
def test_a_dead_worker_of_this_machine_is_replaced_at_once(server, folder):
    check_replacement(storage_of(folder, server))


@pytest.mark.full  # a server of its own
def test_several_workers_never_run_one_too_many(server, folder):
    errors = []

    def run():
        try:
            work(folder, 15, 0.0, server)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert errors == []
    study = storage_of(folder, server).open()
    assert check_complete(study, 15) == []
    assert len(study.trials) == 15


@pytest.mark.slow  # longer than the grace, on purpose
def test_all_trials_of_a_long_batch_give_signs_of_life(server, folder):
    """Two workers, whose batches take longer than the grace, take none from each other."""
    errors = []

    def run():
        try:
            work(folder, 12, 1.1 * GRACE / 3, server, halving=3)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    study = storage_of(folder, server).open()
    assert check_complete(study, 12) == []
    batches = Counter(trial.user_attrs[BATCH] for trial in study.trials)
    assert sorted(batches.values()) == [3, 3, 3, 3]


@pytest.mark.full  # a server of its own
def test_a_trial_without_any_sign_of_life_is_run_again(server, folder):
    """Its worker died between asking for it and the first heartbeat."""
    storage = storage_of(folder, server)
    study = storage.open()
    with storage.locked():
        study.enqueue_trial(Starts().starts()[0].params(None))
        study.ask()
    done = work(folder, 7, 0.0, server)
    assert [trial.number for trial in check_complete(done, 7)] == [0]


@pytest.mark.full  # a server of its own
def test_another_study_of_the_name_is_refused(server, folder, tmp_path):
    storage = PostgresStorage(folder, server)
    claim_study(storage, meta())
    claim_study(PostgresStorage(folder, server), meta())
    elsewhere = PostgresStorage(tmp_path / "other machine" / folder.name, server)
    for changed, said in (
        ({"budget": 0.4}, "budget: 0.2 here, 0.4 asked"),
        (
            {"model_hash": "x", "task": "docs"},
            "model_hash: 'a' here, 'x' asked; task: 'shapes' here, 'docs' asked",
        ),
    ):
        with pytest.raises(UserError, match=f"is another study .{said}.; choose another folder"):
            claim_study(elsewhere, meta(**changed))
    claim_study(elsewhere, meta())
    assert read_study(elsewhere.folder).study_name == folder.name


@pytest.mark.full  # a server of its own
def test_notes_of_version_0_1_0_are_read(server, folder):
    """What the study is about as a user attribute, not as text; evidence as a system attribute."""
    storage = PostgresStorage(folder, server)
    study = storage.open()
    study.set_user_attr("study", meta().model_dump(mode="json"))
    text = dump_evidence(Evidence(2, 9))
    storage.backend().set_study_system_attr(study._study_id, "avlprof:evidence", text)
    claim_study(storage, meta())
    assert stored_meta(storage) == meta()
    assert read_evidence(storage).tokens == 9
    with pytest.raises(UserError, match=rf"has no study '{folder.name}-2'; begin it with 'avlprof tune'"):
        stored_meta(PostgresStorage(folder.with_name(f"{folder.name}-2"), server))


@pytest.mark.full  # a server of its own
def test_a_foreign_study_is_refused(server, folder):
    PostgresStorage(folder, server).open().ask()
    with pytest.raises(UserError, match="is a study that avlprof did not make"):
        claim_study(PostgresStorage(folder, server), meta())


@pytest.mark.full  # a server of its own
def test_the_folder_remembers_the_database_and_not_its_password(server, folder):
    secret = server.replace("tester@", "tester:hush@")
    claim_study(find_storage(folder, secret), meta())
    assert all("hush" not in path.read_text() for path in folder.iterdir())
    storage = find_storage(folder)
    assert isinstance(storage, PostgresStorage)
    assert read_study(folder).get_trials() == []
    with pytest.raises(UserError, match=r"are in postgresql.*, not in postgresql.*/elsewhere; choose"):
        find_storage(folder, server.replace("/postgres", "/elsewhere"))
    work(folder, 3, 0.0, server)
    assert len(read_study(folder).trials) == 3


@pytest.mark.full  # a server of its own
def test_a_journal_does_not_move_into_a_database(server, tmp_path):
    FolderStorage(tmp_path).open()
    with pytest.raises(UserError, match="are in its journal; leave the storage out"):
        find_storage(tmp_path, server)


@pytest.mark.full  # a server of its own
def test_workers_share_the_evidence_of_the_first(server, folder, tmp_path):
    rng = np.random.default_rng(0)
    mine = Evidence(2, 30, coverage=rng.random((2, 30)))
    first = shared_evidence(PostgresStorage(folder, server), lambda: mine)
    second = shared_evidence(PostgresStorage(tmp_path / "other" / folder.name, server), lambda: 1 / 0)
    assert first is mine
    np.testing.assert_array_equal(second.coverage, mine.coverage)
    assert (second.layers, second.tokens, second.damage) == (2, 30, None)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "sqlite:///study.db",
            "must be a PostgreSQL URL .* got one of sqlite; without one the journal",
        ),
        ("mysql://a:hush@b/c", "got one of mysql"),
        ("not a url", "storage must be a URL like postgresql://"),
    ],
)
def test_other_databases_are_refused(url, said, folder):
    with pytest.raises(UserError, match=said) as refused:
        find_storage(folder, url)
    assert "hush" not in str(refused.value)


def test_a_database_that_is_not_there_is_told_in_a_sentence(folder):
    storage = PostgresStorage(folder, "postgresql://tester:hush@127.0.0.1:1/none")
    with pytest.raises(
        UserError, match=r"database postgresql\+psycopg://tester@127.0.0.1:1/none cannot be"
    ) as refused:
        storage.backend()
    assert "hush" not in str(refused.value)


def test_drivers():
    assert database_url("postgres://a/b").drivername == "postgresql+psycopg"
    assert database_url("postgresql+psycopg2://a/b").drivername == "postgresql+psycopg2"
