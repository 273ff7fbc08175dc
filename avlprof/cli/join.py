"""`avlprof join`: what a launcher starts to help an `evaluate` or `compare` that runs elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avlprof.cli._options import model_options, on_own_device, task_options
from avlprof.cli._output import note
from avlprof.errors import UserError, counted
from avlprof.models.spec import ModelSpec

if TYPE_CHECKING:
    from avlprof.tasks.spec import TaskSpec

app = typer.Typer(add_completion=False)


@app.command("join", hidden=True)
@model_options
@task_options
def join_queue(
    spec: ModelSpec,
    source: TaskSpec,
    folder: Annotated[Path, typer.Argument(metavar="QUEUE", help="Folder of the tasks.")],
) -> None:
    """Answer samples for an evaluation that runs with several workers, until it is over."""
    from avlprof.launchers import WORKER

    worker = os.environ.get(WORKER)
    if worker is None:
        raise UserError("'avlprof join' is what a launcher starts; give --workers to evaluate or compare")
    if not folder.is_dir():
        return
    from avlprof.evaluation.shared import serve_answers
    from avlprof.launchers.queue import Queue
    from avlprof.models import load_model

    done = serve_answers(load_model(on_own_device(spec)), source.load(), Queue(folder), worker)
    note(f"{counted(done, 'task')} done")
