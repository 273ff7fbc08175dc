"""`avlprof report`: one HTML file about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from avlprof.cli import _options as options
from avlprof.cli._options import run_or_newest
from avlprof.cli._output import finished, size
from avlprof.cli._progress import bars
from avlprof.files import check_output

app = typer.Typer(add_completion=False)


@app.command()
def report(
    run: options.RunArgument = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Show a policy and its cost: a YAML file or a name.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="Another run: show how this one differs from it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file; by default RUN/report.html.")
    ] = None,
    pictures: Annotated[int, typer.Option("--pictures", min=0, help="Samples to show with heatmaps.")] = 3,
    task: Annotated[
        str | None, typer.Option("--task", help="Where the pictures are, if the run cannot tell.")
    ] = None,
) -> None:
    """Write one HTML file about a run: findings, figures, heatmaps, a policy, how to repeat it.

    The file needs no network and no other file, so it can be mailed or archived as it is.
    """
    from avlprof.policy import find_policy
    from avlprof.report import write_report
    from avlprof.run import Run
    from avlprof.tasks import load_task

    check_output(out)
    costed = None if policy is None else find_policy(policy)
    other = None if against is None else Run.open(against)
    source = None if task is None else load_task(task)
    traced = run_or_newest(run)
    path = out or traced.path / "report.html"
    check_output(path)
    for one in (traced, other):
        if one is not None:
            with bars() as watch:
                one.profile(watch)
    write_report(traced, path, policy=costed, against=other, pictures=pictures, task=source)
    finished([f"{path} ({size(path.stat().st_size)})"], f"open {path.resolve().as_uri()} in a browser")
