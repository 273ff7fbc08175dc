"""`avlprof explore`: an interactive page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avlprof.cli import _options as options
from avlprof.cli._options import noted_options, run_or_newest
from avlprof.cli._output import finished, size
from avlprof.cli._progress import bars
from avlprof.files import check_output
from avlprof.models.spec import ModelSpec

if TYPE_CHECKING:
    from avlprof.models import LoadedModel
    from avlprof.run import Run
    from avlprof.tasks.spec import TaskSpec

app = typer.Typer(add_completion=False)


@app.command()
@noted_options
def explore(
    spec: ModelSpec,
    source: TaskSpec,
    run: options.RunArgument = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", help="Run the samples under it too and show it beside: a file or a name."),
    ] = None,
    against: Annotated[Path | None, typer.Option("--against", help="Another run: show it beside.")] = None,
    lens: Annotated[
        Path | None,
        typer.Option("--lens", help="Folder of avlprof lens: show what each patch says behind each layer."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="How many samples to show.")] = 16,
    sample: Annotated[
        list[str] | None, typer.Option("--sample", help="Show this sample; repeat for several.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file; by default RUN/explore.html.")
    ] = None,
) -> None:
    """Write an interactive page about a run: click a word or a patch, play through the answer.

    The file needs no network and no other file. With --policy the run's model is loaded; --model, --task
    and the options of each are needed only where the run cannot tell, as when a folder has moved.
    """
    from avlprof.policy import find_policy
    from avlprof.run import Run

    check_output(out)
    tried = None if policy is None else find_policy(policy)
    other = None if against is None else Run.open(against)
    traced = run_or_newest(run)
    path = out or traced.path / "explore.html"
    check_output(path)
    task = source.load() if source.name else None
    loaded = None if tried is None else _load(spec, traced)
    with bars() as watch:
        page = traced.explore(
            sample or samples,
            against=other,
            policy=tried,
            loaded=loaded,
            task=task,
            lens=lens,
            watch=watch,
        )
    page.save(path)
    finished([f"{path} ({size(path.stat().st_size)})"], f"open {path.resolve().as_uri()} in a browser")


def _load(spec: ModelSpec, run: Run) -> LoadedModel:
    """The model of a run; what options say goes before."""
    from dataclasses import replace

    from avlprof.models import load_model

    dtype = run.meta.dtype if spec.dtype == "auto" else spec.dtype
    return load_model(replace(spec, name=spec.name or run.meta.model, dtype=dtype))
