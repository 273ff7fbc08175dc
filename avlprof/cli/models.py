"""`avlprof models`: the models that have a short name."""

from __future__ import annotations

import typer

from avlprof.cli._output import (
    Format,
    FormatOption,
    note,
    show,
)

app = typer.Typer(add_completion=False)


@app.command()
def models(form: FormatOption = Format.table) -> None:
    """List the short names of models and what is special of each; hub ids and folders work as well."""
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
