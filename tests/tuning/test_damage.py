"""Studies whose files are damaged: what is sound still counts, and what is not is named."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import stat
from pathlib import Path

import pytest
from optuna.trial import TrialState
from typer.testing import CliRunner

from avlprof.cli._app import app
from avlprof.errors import UserError
from avlprof.locks import is_locked, locked
from avlprof.tuning import read_study
from avlprof.tuning.reading import Study, overview, rows_below
from avlprof.tuning.storages import records
from avlprof.tuning.storages.journal import FolderStorage

OLD = Path(__file__).parents[1] / "data" / "0.1.0" / "study"
TORN = b'{"op_code": 7, "worker_id": "61{"op_code": 7, "worker_id": "617e"}\n'
NEWER = b'{"op_code": 99, "worker_id": "z"}\n'


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(OLD, tmp_path / "s")
    records._warned.clear()
    return tmp_path / "s"


def lines(folder):
    return (folder / "journal.log").read_bytes().splitlines(keepends=True)


def write(folder, content):
    (folder / "journal.log").write_bytes(b"".join(content))


def scores(folder):
    return {t.number: t.value for t in read_study(folder).get_trials(states=[TrialState.COMPLETE])}


WHOLE = scores(OLD)


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


# --- the journal


@pytest.mark.parametrize("bad", [TORN, NEWER, b"\n", b"\x00" * 300 + b"\n", b"\xff\xfe{\n", b"[1]\n", b"3\n"])
@pytest.mark.parametrize("where", [1, 40, -1])
def test_a_line_that_is_no_record_is_set_aside(folder, bad, where, caplog):
    content = lines(folder)
    content.insert(len(content) if where == -1 else where, bad)
    write(folder, content)
    with caplog.at_level(logging.WARNING):
        assert scores(folder) == WHOLE == scores(folder)
    (said,) = [r.getMessage() for r in caplog.records if "set aside" in r.getMessage()]
    assert f"line {len(content) if where == -1 else where + 1} of {folder / 'journal.log'}" in said


def test_no_line_takes_another_with_it(folder):
    """Each line in turn is cut short, and the next record appended to it."""
    content = lines(folder)
    for number in range(len(content) - 1):
        line = content[number].rstrip(b"\n")
        write(folder, [*content[:number], line[: len(line) // 2], *content[number + 1 :]])
        left = scores(folder)
        op = json.loads(line)["op_code"]
        lost = set(WHOLE) - set(left)
        assert len(lost) <= (op == 6) and all(left[n] == WHOLE[n] for n in left), (number, op, lost)


def test_campaign_of_damaged_bytes(folder):
    content, draw = lines(folder), random.Random(0)
    for _ in range(60):
        number = draw.randrange(len(content))
        line = bytearray(content[number])
        for _ in range(draw.randint(1, 20)):
            line[draw.randrange(len(line) - 1)] = draw.choice(b'\x00\xff{}"[]:, 9a')
        write(folder, [*content[:number], bytes(line), *content[number + 1 :]])
        try:
            left = scores(folder)
        except UserError:
            continue
        assert len(set(WHOLE) - set(left)) <= 1


def test_a_record_that_newer_ones_follow_is_read_once(folder):
    content = lines(folder)
    write(folder, [*content[:30], TORN, *content[30:50]])
    study = read_study(folder)
    before = len(study.get_trials(deepcopy=False))
    with (folder / "journal.log").open("ab") as file:
        file.write(b"".join(content[50:-1]) + content[-1][:-5])
    assert len(study.get_trials(deepcopy=False)) >= before
    with (folder / "journal.log").open("ab") as file:
        file.write(content[-1][-5:])
    assert {t.number: t.value for t in study.get_trials(states=[TrialState.COMPLETE])} == WHOLE


def test_a_damaged_study_goes_on(folder):
    content = lines(folder)
    write(folder, [*content[:20], TORN, *content[20:], NEWER])
    study = FolderStorage(folder).open()
    trial = study.ask()
    study.tell(trial, 7.0)
    assert scores(folder) == WHOLE | {trial.number: 7.0}


@pytest.mark.parametrize("content", [b"", b"{", b"\n\n"])
def test_a_journal_without_a_record_has_no_trial(folder, content):
    (folder / "journal.log").write_bytes(content)
    assert overview(folder).state == "new"
    with pytest.raises(UserError, match="no trial yet"):
        read_study(folder)


def test_a_journal_that_is_a_folder_is_named(folder):
    (folder / "journal.log").unlink()
    (folder / "journal.log").mkdir()
    with pytest.raises(UserError, match=r"journal\.log cannot be read"):
        Study.open(folder).trials()


def test_the_commands_go_on_past_a_damaged_line(folder):
    write(folder, [*lines(folder)[:40], TORN, *lines(folder)[40:]])
    for words in (("studies", "ls", folder.parent), ("studies", "show", folder), ("export", folder)):
        done = invoke(*words)
        assert done.exit_code == 0, done.output


# --- many studies, one of them broken


BROKEN = {
    "ff": lambda f: (f / "study.json").write_bytes(b"\xff"),
    "no fields": lambda f: (f / "study.json").write_text("{}"),
    "no text": lambda f: (f / "study.json").write_text(""),
    "a folder": lambda f: ((f / "study.json").unlink(), (f / "study.json").mkdir()),
    "journal": lambda f: ((f / "journal.log").unlink(), (f / "journal.log").mkdir()),
    "policy": lambda f: (f / "policy.yaml").write_bytes(b"\xff"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_one_broken_study_hides_no_other(folder, kind):
    bad = folder.with_name("a-bad")
    shutil.copytree(OLD, bad)
    BROKEN[kind](bad)
    rows, sentences = rows_below(folder.parent)
    assert {row["name"]: row["state"] for row in rows}["s"] == overview(OLD).state != "broken"
    assert {row["name"]: row["state"] for row in rows}["a-bad"] == "broken"
    assert len(sentences) == 1 and str(bad) in sentences[0] and len(sentences[0]) < 500
    for form in ("table", "json", "csv"):
        done = invoke("studies", "ls", folder.parent, "--format", form)
        assert done.exit_code == 0 and "a-bad is broken" in " ".join(done.output.split()).replace("\n", "")
    shown = invoke("studies", "show", bad)
    assert shown.exit_code == 2 and "Traceback" not in shown.output


@pytest.mark.parametrize("name", ["importances.csv", "knobs.csv"])
@pytest.mark.parametrize("content", [b"", b"\xff\xff", b"a,b\n1,2\n", b'"'])
def test_a_damaged_table_is_left_out(folder, name, content):
    (folder / name).write_bytes(content)
    done = invoke("studies", "show", folder)
    assert done.exit_code == 0, done.output


def test_looking_writes_nothing(folder):
    for path in (*folder.rglob("*"), folder):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}
    try:
        assert invoke("studies", "ls", folder.parent).exit_code == 0
        assert invoke("studies", "show", folder).exit_code == 0
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode | stat.S_IWUSR)
    assert before == {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def test_a_lock_is_seen_through_a_file_that_may_only_be_read(tmp_path, monkeypatch):
    path, opened = tmp_path / "lock", os.open
    with locked(path):
        monkeypatch.setattr(os, "open", lambda name, flags, *more: opened(_read_only(flags, name), flags))
        assert is_locked(path)
    assert not is_locked(path) and not is_locked(tmp_path / "absent")


def _read_only(flags, name):
    if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
        raise PermissionError(13, "Permission denied", str(name))
    return name
