"""The command line as tests call it, and the sentence of a refusal."""

from __future__ import annotations

from typer.testing import CliRunner

from avlprof.cli._app import app


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
