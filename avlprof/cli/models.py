"""`avlprof models`: the models that have a short name, and what every type of transformers allows."""

from __future__ import annotations

from typing import Annotated

import typer

from avlprof.cli._output import (
    Format,
    FormatOption,
    note,
    show,
)

app = typer.Typer(add_completion=False)


@app.command()
def models(
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
    if types:
        _types(form)
        return
    from avlprof.models import ALIASES

    rows = [
        {
            "name": name,
            "source": alias.source,
            "family": alias.family,
            "tested": alias.tested,
            "special": ", ".join(alias.special),
        }
        for name, alias in ALIASES.items()
    ]
    show(rows, form)
    note("next: avlprof trace --model NAME (a hub id like owner/name and a local folder work too)")


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
