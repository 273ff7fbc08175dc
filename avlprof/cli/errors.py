"""Errors on the command line: one sentence on stderr and an exit code, no traceback."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator

import typer

from avlprof.errors import UserError

USER, UNEXPECTED, INTERRUPTED = 2, 1, 130


@contextlib.contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Tell what goes wrong inside in one line and leave with its exit code.

    With `debug` the traceback comes first. Wrong usage (an unknown option, a value of the wrong
    type) counts as the user's error.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command resumes", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except UserError as error:
        raise _told(str(error), USER, debug) from None
    except Exception as error:
        if hasattr(error, "format_message"):
            said = str(error.format_message()).replace("Value error, ", "").rstrip(".")
            raise _told(f"{said}{_help(error)}", USER, debug) from None
        said = " ".join(str(error).split())
        hint = "" if debug else "; run 'avlprof --debug ...' to see where"
        raise _told(f"unexpected {type(error).__name__}: {said}{hint}", UNEXPECTED, debug) from None


def _told(message: str, code: int, debug: bool) -> typer.Exit:
    if debug:
        traceback.print_exc(file=sys.stderr)
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return typer.Exit(code)


def _help(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f" (see '{context.command_path} --help')" if context is not None else ""
