"""`avlprof knockout`: what is lost when one kind of token may no longer look at another."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avlprof.cli._options import model_options, parse_layers, task_options
from avlprof.cli._output import (
    FigureFormat,
    FigureFormatOption,
    Format,
    FormatOption,
    finished,
    note,
    records,
    show,
)
from avlprof.cli._progress import bars
from avlprof.errors import UserError, counted, shortened
from avlprof.files import check_output
from avlprof.models.spec import ModelSpec

if TYPE_CHECKING:
    from avlprof.analysis import Profile
    from avlprof.evaluation import Knockout
    from avlprof.models import LoadedModel
    from avlprof.tasks import Task
    from avlprof.tasks.spec import TaskSpec

app = typer.Typer(add_completion=False)


@app.command("knockout")
@model_options
@task_options
def knock_out(
    spec: ModelSpec,
    source: TaskSpec,
    route: Annotated[
        list[str] | None,
        typer.Option(
            "--route",
            help="SOURCE-to-TARGET of system, vision, question, answer, last, generated; repeat. By default "
            "question-to-vision, answer-to-vision, answer-to-question.",
        ),
    ] = None,
    window: Annotated[
        str, typer.Option("--window", help="Layers closed together, around each; or rest: it and all behind.")
    ] = "1",
    layers: Annotated[
        str | None, typer.Option("--layers", help="Around these alone, such as 0-5,8; by default all.")
    ] = None,
    heads: Annotated[bool, typer.Option("--heads", help="Close each query head by itself, too.")] = False,
    answers: Annotated[
        bool,
        typer.Option("--answers/--no-answers", help="Say the answers that change, for the task's metric."),
    ] = True,
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="How many samples.")] = 64,
    split: Annotated[str, typer.Option("--split", help="Which split of the task.")] = "search",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Samples that run together.")] = 16,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run", help="Traced run to set beside; by default the newest of this model and task, if any."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder; by default knockouts/<model>-<task>-<split>."),
    ] = None,
    form: FormatOption = Format.table,
    figure_format: FigureFormatOption = FigureFormat.png,
) -> None:
    """Close routes of attention, layer by layer or head by head, and measure what the answers lose.

    A question that may not look at the picture, an answer that may not look at the question. What was
    measured is kept in the output folder, so the same command resumes, and one that asks for more adds to it.
    """
    from avlprof.evaluation import KnockoutSettings, LossStore
    from avlprof.evaluation.knockout import ROUTES, knockout
    from avlprof.locks import FolderLock
    from avlprof.models import load_model

    settings = KnockoutSettings(
        split=split,
        samples=samples,
        batch_size=batch_size,
        routes=tuple(route) if route else ROUTES,
        window=_window(window),
        layers=parse_layers(layers),
        heads=heads,
        answers=answers,
    )
    task = source.load()
    task.samples(split, samples)
    label = f"{Path(spec.name).name}-{task.name}-{split}"
    folder = out or Path("knockouts") / re.sub(r"[^\w.-]+", "-", label)
    check_output(folder, folder=True)
    lock = FolderLock(folder / "parts")
    store = LossStore(folder / "parts")
    loaded = load_model(spec)
    profile = _profile(loaded, task, run)
    with lock, bars(resumes=True) as watch:
        found = knockout(loaded, task, settings, store=store, watch=watch)
    wrote = _write(found, folder, figure_format, profile)
    _print(found, form, profile)
    verb = "tune" if profile else "trace"  # a trace sets attention beside the damage
    finished(wrote, f"avlprof {verb} --model {spec.name} --task {source.name}")


def _window(text: str) -> Any:
    if text == "rest":
        return text
    if not text.isdecimal() or not 0 < len(text) < 6:
        raise UserError(f"--window must be a number of layers, or rest, got {shortened(text)}")
    return int(text)


def _profile(loaded: LoadedModel, task: Task, run: Path | None) -> Profile | None:
    """What a traced run of the model attends to; None where there is none and none was asked for."""
    from avlprof.run import Run, latest_run

    traced = Run.open(run) if run else latest_run(loaded=loaded, task=task.name)
    if traced is None:
        return None
    traced.check_model(loaded)
    note(f"attention from run {traced.path}")
    return traced.profile()


def _write(found: Knockout, folder: Path, suffix: str, profile: Profile | None) -> list[Path]:
    from avlprof.plots.beside import damage_beside_attention
    from avlprof.plots.knockout import knockout_heads, knockout_map
    from avlprof.plots.save import save_figure

    summary, meta = found.summary(), found.meta
    metric = f"{str(meta['metric']).replace('_', ' ')} on {meta['task']} ({meta['split']})"
    wrote = [
        found.to_parquet(folder / "losses.parquet"),
        found.to_csv(folder / "summary.csv"),
        found.to_json(folder / "summary.json", profile),
        save_figure(knockout_map(summary, metric), folder / "knockout", suffix),
    ]
    if (summary["head"] >= 0).any():
        wrote.append(save_figure(knockout_heads(summary), folder / "heads", suffix))
    beside = None if profile is None else found.beside(profile)
    if profile is not None and beside is not None and len(beside):
        figure = damage_beside_attention(summary, beside, found.attention(profile))
        wrote.append(save_figure(figure, folder / "beside", suffix))
    return wrote


def _print(found: Knockout, form: Format, profile: Profile | None) -> None:
    from avlprof.evaluation.damage import ALL, words

    summary, meta = found.summary(), found.meta
    for line in found.warnings():
        note(line)
    if form is not Format.table:
        show(records(summary), form)
    else:
        whole = summary[summary["head"] == ALL]
        about = f"{counted(meta['samples'], 'sample')} of {meta['split']}, {meta['metric']}"
        show([_row(row) for row in records(whole)], form, f"{meta['model']} on {meta['task']}, {about}")
        note("kl: nat per token from the full model; intervals are 95%, not corrected for the number of rows")
        for line in _worst_heads(summary):
            note(line)
    for line in words(found.beside(profile)) if profile is not None else []:
        note(line)


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """What fits a terminal."""
    first, last = int(row["first"]), int(row["last"])
    where = "all" if row["layer"] < 0 else str(first) if first == last else f"{first}-{last}"
    cells = {
        "route": row["route"],
        "layers": where,
        "kl": f"{row['kl']:.4f} [{row['kl_low']:.4f}, {row['kl_high']:.4f}]",
        "same answers": f"{100 * row['same']:.0f}%",
    }
    if row["score"] is None or math.isnan(row["score"]):
        return cells
    change = f"{row['difference']:+.3f} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"
    return cells | {"score": row["score"], "vs full": change, "p_value": row["p_value"]}


def _worst_heads(summary: Any) -> list[str]:
    """The head of each route that is missed most, in words."""
    single = summary[summary["head"] >= 0]
    lines = []
    for route, own in single.groupby("route", sort=False):
        worst = own.loc[own["kl"].idxmax()]
        lines.append(
            f"{route}: of single heads, head {worst['head']} of layer {worst['layer']} is missed most "
            f"(kl {worst['kl']:.4f} [{worst['kl_low']:.4f}, {worst['kl_high']:.4f}])"
        )
    return lines
