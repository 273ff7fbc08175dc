"""Errors on the command line: one sentence on stderr and an exit code, no traceback."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup
from typer.main import get_command

from avlprof.cli._failures import flags_of, sentence
from avlprof.cli._heap import keep_freed_memory
from avlprof.cli._progress import quiet_libraries
from avlprof.cli._signals import ending_once
from avlprof.cli._start import prepare
from avlprof.errors import cut

USER, UNEXPECTED, INTERRUPTED = 2, 1, 130


@contextlib.contextmanager
def reported(
    debug: bool, flags: Callable[[], Iterable[str]] = tuple, words: Sequence[str] = ()
) -> Iterator[None]:
    """Tell what goes wrong inside in one line and leave with its exit code.

    With `debug` the traceback comes first. Wrong usage (an unknown option, a value of the wrong
    type) counts as the user's error, and so does what the system refuses. `flags` are the options by
    which the message calls arguments.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt as error:
        typer.echo("interrupted; the same command resumes", err=True)
        raise typer.Exit(getattr(error, "code", INTERRUPTED)) from None
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(getattr(error, "ctx").get_help())  # noqa: B009 - typer's own class is private
            raise typer.Exit from None
        said = sentence(error, flags(), words)
        if said is not None:
            raise _told(said, USER, debug) from None
        hint = "" if debug else "; run 'avlprof --debug ...' to see where"
        unexpected = f"unexpected {type(error).__name__}: {cut(str(error))}{hint}"
        raise _told(unexpected, UNEXPECTED, debug) from None


def _told(message: str, code: int, debug: bool) -> typer.Exit:
    if debug:
        traceback.print_exc(file=sys.stderr)
    typer.echo(f"error: {cut(message, 1000)}", err=True)
    return typer.Exit(code)


COMMANDS: Final[dict[str, str]] = {
    "trace": "avlprof.cli.trace",
    "analyze": "avlprof.cli.analyze",
    "report": "avlprof.cli.report",
    "explore": "avlprof.cli.explore",
    "lens": "avlprof.cli.lens",
    "derive": "avlprof.cli.derive",
    "policy": "avlprof.cli.policy",
    "run": "avlprof.cli.run",
    "tune": "avlprof.cli.tune",
    "studies": "avlprof.cli.studies",
    "export": "avlprof.cli.export",
    "evaluate": "avlprof.cli.evaluate",
    "compare": "avlprof.cli.compare",
    "join": "avlprof.cli.join",
    "leaderboard": "avlprof.cli.leaderboard",
    "knockout": "avlprof.cli.knockout",
    "bench": "avlprof.cli.bench",
    "demo": "avlprof.cli.demo",
    "models": "avlprof.cli.models",
    "tasks": "avlprof.cli.tasks",
}
"""Name of each command, in the order of the help, to the module that holds its `app`."""


class Commands(TyperGroup):
    """Imports a command's module when it is asked for, and turns errors into one line each."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        command: Any = get_command(import_module(COMMANDS[cmd_name]).app)
        command.name = cmd_name
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from avlprof.registry import unknown

            raise unknown("command", args[0], COMMANDS)
        return super().resolve_command(ctx, args)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        with reported(debug=False):
            words = list(args)
            context = super().make_context(info_name, args, parent, **extra)
            context.meta["words"] = words
            return context

    def invoke(self, ctx: Any) -> Any:
        def flags() -> Iterable[str]:
            command = self.get_command(ctx, ctx.invoked_subcommand) if ctx.invoked_subcommand else None
            return flags_of(command)

        with reported(bool(ctx.params.get("debug")), flags, ctx.meta.get("words", ())):
            return super().invoke(ctx)


def _version(wanted: bool) -> None:
    if wanted:
        from avlprof.versions import __version__

        typer.echo(f"avlprof {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    help="Trace, tune and run adaptive attention policies for large vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and what libraries log.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if not debug:
        context.with_resource(quiet_libraries())


def main() -> None:
    """Run the command line.

    Exits with 0, 1 (unexpected), 2 (the user's to mend), or 130, 143 or 129 (Ctrl-C, TERM, HUP).
    """
    prepare(sys.argv[1:])
    keep_freed_memory()
    with ending_once(last=True):
        prepare(sys.argv[1:])
        app(prog_name="avlprof")
