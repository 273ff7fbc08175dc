"""`avlprof export`: a policy of a study as YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from avlprof.cli._output import finished
from avlprof.files import check_output

app = typer.Typer(add_completion=False)


@app.command()
def export(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="Folder of a study.")],
    trial: Annotated[
        int | None, typer.Option("--trial", help="Take this trial instead of the winner.")
    ] = None,
    max_read: Annotated[
        float | None,
        typer.Option("--max-read", help="Take the best trial that reads at most this share per step."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Policy file; without it, stdout.")] = None,
) -> None:
    """Write the winner, a trial, or a point of the front of a study as a policy file."""
    from avlprof.policy import dump_policy, save_policy
    from avlprof.tuning import export_policy

    check_output(out)
    policy = export_policy(study, trial, max_read)
    if out is None:
        typer.echo(dump_policy(policy), nl=False)
        return
    finished([save_policy(policy, out)], f"avlprof policy show {out}")
