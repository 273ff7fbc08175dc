"""`avlprof studies`: list studies, show one, work on one, open one in optuna-dashboard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avlprof.cli._options import noted_options, on_own_device
from avlprof.cli._output import Format, FormatOption, cell, note, percent, show
from avlprof.cli._progress import bars
from avlprof.models.spec import ModelSpec
from avlprof.tuning.settings import Settings

if TYPE_CHECKING:
    from avlprof.tasks.spec import TaskSpec

app = typer.Typer(
    help="List, show, join and open studies of 'avlprof tune'.", no_args_is_help=True, add_completion=False
)

StudyArgument = Annotated[Path, typer.Argument(metavar="STUDY", help="Folder of a study.")]


@app.command("ls")
def list_studies(
    root: Annotated[Path, typer.Argument(metavar="[ROOT]", help="Where to look.")] = Path("studies"),
    form: FormatOption = Format.table,
) -> None:
    """List the studies below a folder: what they search, how far they are, what they found."""
    from avlprof.tuning.reading import rows_below

    rows, broken = rows_below(root)
    if form is Format.table and rows:
        rows = [_short(row) for row in rows]
    show(rows, form, cells={"budget": percent, "read budget": percent})
    for sentence in broken:
        note(sentence)
    note("next: avlprof studies show FOLDER" if rows else f"no study below {root}/; avlprof tune makes one")


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Trials done and wanted in one column, for people."""
    done = f"{row['trials']}/{cell(row['wanted'])}"
    return {name: done if name == "trials" else row[name] for name in row if name != "wanted"}


@app.command("show")
def show_study(
    study: StudyArgument,
    trials: Annotated[int, typer.Option("--trials", min=1, help="How many of the best trials.")] = 10,
    form: FormatOption = Format.table,
) -> None:
    """Show the best trials of a study, and which parameters matter among all trials and in the winner."""
    from avlprof.tuning import read_study
    from avlprof.tuning.importance import importance_rows
    from avlprof.tuning.reading import POLICY, best_trials, knob_sentences, overview, trial_rows

    summary, begun = overview(study), read_study(study)
    rows = trial_rows(best_trials(begun, trials))
    if form is not Format.table:
        show(rows, form)
        return
    meta = summary.meta
    title = f"{study.resolve().name}: {meta.model} on {meta.task}, {percent(meta.budget)} of the prompt KV"
    if meta.read_budget is not None:
        title += f", {percent(meta.read_budget)} read per step"
    fixed = ("trial", "score", "live", "read", "samples")
    short = [{name: row[name] for name in fixed} | {"parameters": _joined(row, fixed)} for row in rows]
    show(short, form, title, {"live": percent, "read": percent})
    done = f"{summary.done} of {cell(summary.trials)} trials, {summary.state}"
    note(f"{done}; score: {meta.objective}, lower is better")
    if important := importance_rows(study, begun):
        show(
            important,
            form,
            f"what the score depends on, over the whole space (fANOVA, {summary.done} trials)",
        )
    for sentence in knob_sentences(study):
        note(f"winner with {sentence}")
    if summary.winner is not None:
        note(f"policy: {study / POLICY}")
    note(f"next: avlprof export {study} --trial N -o policy.yaml")


def _joined(row: dict[str, Any], without: tuple[str, ...]) -> str:
    rest = {name: value for name, value in row.items() if name not in without and value is not None}
    return ", ".join(f"{name} {cell(value)}" for name, value in rest.items())


@app.command("join")
@noted_options
def join_study(
    study: StudyArgument,
    spec: ModelSpec,
    source: TaskSpec,
    storage: Annotated[
        str | None, typer.Option("--storage", help="PostgreSQL URL, for a study begun on another machine.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Samples that run together.")
    ] = Settings.batch_size,
    prompt_bytes: Annotated[
        int | None,
        typer.Option(
            "--prompt-bytes",
            help="Prefilled prompts that stay on the device; by default half of what is free.",
        ),
    ] = Settings.prompt_bytes,
) -> None:
    """Work on a study that 'avlprof tune' began, on this machine or another, until its trials are done.

    Model and task are those of the study; name them where they lie elsewhere on this machine.
    """
    from avlprof.models import load_model
    from avlprof.tuning.study import find_storage, stored_meta
    from avlprof.tuning.workers import join

    begun = find_storage(study, storage)
    meta = stored_meta(begun)
    dtype = meta.dtype if spec.dtype == "auto" else spec.dtype
    model, task = replace(spec, name=spec.name or meta.model, dtype=dtype), source.name or meta.task
    with bars() as watch:
        join(
            load_model(on_own_device(model)),
            replace(source, name=task).load(),
            begun,
            batch_size=batch_size,
            prompt_bytes=prompt_bytes,
            watch=watch,
        )


@app.command("open")
def open_dashboard(
    study: StudyArgument,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on; 0 takes a free one.")] = 8080,
) -> None:
    """Open a study in optuna-dashboard, with notes and figures; Ctrl-C ends it."""
    from avlprof.tuning.dashboard import serve

    serve(study, host, port, lambda address: note(f"open {address} (Ctrl-C ends it)"))
