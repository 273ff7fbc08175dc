"""The command line as tests call it, and the sentence of a refusal."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

from typer.testing import CliRunner

from avlprof.cli._app import app
from tests.helpers import settle_threads


def invoke(*arguments, **options):
    """A command in this process; stdout and stderr apart."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="avlprof", **options)


def refused(result):
    """The sentence of a refusal: the last line on stderr, with exit code 2 and no traceback."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert result.stderr.rstrip().endswith(lines[0])
    return lines[0].removeprefix("error: ")


@contextlib.contextmanager
def unwritable(folder: Path) -> Iterator[Path]:
    """A folder in which nothing may be written for a while; see `bystander`."""
    paths = (folder, *folder.rglob("*"))
    for path in paths:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        yield folder
    finally:
        for path in paths:
            path.chmod(path.stat().st_mode | stat.S_IWUSR)


def bystander(work: Callable[[], SimpleNamespace]) -> SimpleNamespace:
    """What `work` gives to a user whom permissions hold: for root, in a process that has no rights."""
    if os.geteuid() != 0:
        return work()
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        found = b""
        try:
            settle_threads()
            version, none = 0x20080522, (ctypes.c_uint32 * 6)()
            if ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(version, 0), none) == 0:
                found = pickle.dumps(vars(work()))
        finally:
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(found)
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        found = pipe.read()
    os.waitpid(process, 0)
    assert found, "the process without rights failed"
    return SimpleNamespace(**pickle.loads(found))


def invoke_as_bystander(*arguments, **options) -> SimpleNamespace:
    """As `invoke`, by somebody who may not write everywhere."""

    def work():
        done = invoke(*arguments, **options)
        return SimpleNamespace(
            exit_code=done.exit_code, output=done.output, stdout=done.stdout, stderr=done.stderr
        )

    return bystander(work)
