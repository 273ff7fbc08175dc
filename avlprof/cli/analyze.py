"""`avlprof analyze`: from a run directory to a profile and figures."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avlprof.analysis.statistics import VIEWS
from avlprof.cli import _options as options
from avlprof.cli._options import run_or_newest
from avlprof.cli._output import (
    FigureFormat,
    FigureFormatOption,
    Format,
    FormatOption,
    cells_of,
    finished,
    note,
    print_differences,
    records,
    show,
)
from avlprof.cli._progress import bars
from avlprof.errors import UserError, counted
from avlprof.files import check_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from avlprof.analysis import Profile
    from avlprof.run import Run
    from avlprof.tasks import Task

app = typer.Typer(add_completion=False)


@app.command()
def analyze(
    run: options.RunArgument = None,
    what: Annotated[str, typer.Option("--what", help=f"Table to print: {', '.join(VIEWS)}.")] = "per_layer",
    against: Annotated[
        Path | None, typer.Option("--against", help="Another run: print how this one differs from it.")
    ] = None,
    figures: Annotated[
        bool | None,
        typer.Option("--figures/--no-figures", help="Draw figures; by default without --what and --against."),
    ] = None,
    sample: Annotated[
        str | None,
        typer.Option("--sample", help="Sample of the heatmap; by default the first that has one."),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option("--layer", help="Layer of the heads' heatmap; by default the one that looks most."),
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="Where the pictures are, if the run cannot tell.")
    ] = None,
    form: FormatOption = Format.table,
    figure_format: FigureFormatOption = FigureFormat.png,
) -> None:
    """Say what each layer attends to; writes RUN/profile/ and RUN/figures/."""
    from avlprof.registry import unknown
    from avlprof.tasks import load_task

    if what not in VIEWS:
        raise unknown("table", what, VIEWS)
    if against is not None and what != VIEWS[0]:
        raise UserError(f"give either --what or --against, got --what {what} and --against {against}")
    pictures = load_task(task) if task is not None else None
    traced = run_or_newest(run)
    if sample is not None:
        traced.scores(sample, ["last"])
    if layer is not None and not 0 <= layer < traced.meta.layers:
        raise UserError(f"layer must be in 0 to {traced.meta.layers - 1}, got {layer}")
    summary = what == VIEWS[0] and against is None
    drawn = summary if figures is None else figures
    if drawn:
        check_figures(traced.path / "figures")
    with bars() as watch:
        profile = traced.profile(watch)
    wrote = [traced.path / "profile"] if (traced.path / "profile").is_dir() else []
    if drawn:
        wrote.append(_draw(traced, _figures(traced, profile, sample, pictures, layer), figure_format))
    if against is not None:
        print_differences(profile, _other(against), form)
    else:
        show(records(profile[what]), form, _title(profile), cells_of(what))
    if summary:
        _say(profile, form)
    finished(wrote, f"avlprof derive {traced.path} --budget 0.4")


def check_figures(folder: Path) -> None:
    """`UserError` when figures could not be written, before anything is worked out for them."""
    try:
        check_output(folder, folder=True)
    except UserError as error:
        raise UserError(f"{error}; or leave figures out (--no-figures)") from None


def _other(path: Path) -> Profile:
    from avlprof.run import Run

    with bars() as watch:
        return Run.open(path).profile(watch)


def _say(profile: Profile, form: Format) -> None:
    """The findings: below a table on stdout, else on stderr, where they spoil no data."""
    from avlprof.analysis import findings
    from avlprof.policy import said_governed

    if said := said_governed(profile.governed, profile.layers):
        note(said)
    for sentence in findings(profile):
        typer.echo(sentence, err=form is not Format.table)


def _title(profile: Profile) -> str:
    settings = profile.meta.settings
    return f"{settings.model} on {settings.task}, {counted(profile.meta.samples, 'sample')}"


def _draw(run: Run, figures: Iterable[tuple[str, Callable[[], Figure]]], suffix: str) -> Path:
    """Write every figure that the run has data for, name the others with the reason; the folder."""
    from avlprof.plots import save_figure

    folder = run.path / "figures"
    for name, draw in figures:
        try:
            save_figure(draw(), folder / name, suffix)
        except UserError as error:
            note(f"no figure {name}: {error}")
    return folder


def _figures(
    run: Run, profile: Profile, sample: str | None, task: Task | None, layer: int | None
) -> Iterator[tuple[str, Callable[[], Figure]]]:
    from avlprof.report.figures import plans_for

    for plan in plans_for(profile):
        yield plan.file, partial(plan.draw, profile)
    if profile.meta.settings.per_head:
        yield "head-heatmaps", lambda: _head_heatmaps(run, sample, task, layer)
    yield "vision-heatmap", lambda: _heatmap(run, sample, task)
    yield "word-heatmaps", lambda: _words(run, sample, task)


def _heatmap(run: Run, sample: str | None, task: Task | None) -> Figure:
    from avlprof.models.tiles import parse_tiles
    from avlprof.plots import Caption, vision_heatmap

    row = _sample_with_tiles(run, sample)
    name = str(row["sample"])
    last = run.scores(name, ["last"])["last"]
    caption = Caption(name, str(row["prompt"]), "the last prompt token")
    return vision_heatmap(run.pictures(name, task), last, parse_tiles(row["tiles"]), caption=caption)


def _head_heatmaps(run: Run, sample: str | None, task: Task | None, layer: int | None) -> Figure:
    from avlprof.models.tiles import parse_tiles
    from avlprof.plots import Caption, head_heatmaps

    row = _sample_with_tiles(run, sample)
    name, kind = str(row["sample"]), "last_heads"
    tiles, scores = parse_tiles(row["tiles"]), run.scores(name, [kind])[kind]
    caption = Caption(name, str(row["prompt"]), "the last prompt token")
    pictures = run.pictures(name, task)
    return head_heatmaps(pictures, scores, tiles, layer, kv_heads=run.meta.kv_heads, caption=caption)


def _words(run: Run, sample: str | None, task: Task | None) -> Figure:
    """Row j of the scores is what wrote token j: the prompt's last row, then the decoding steps."""
    import numpy as np

    from avlprof.models.tiles import parse_tiles
    from avlprof.plots import Caption, group_words, word_heatmaps

    row = _sample_with_tiles(run, sample)
    name = str(row["sample"])
    if "tokens" not in row:
        raise UserError(f"run {run.path} has no tokens of its answers; trace into another folder")
    scores = run.scores(name, ["last", "decode"])
    rows = np.concatenate([scores["last"][None], scores["decode"]])
    words, steps = group_words([str(piece) for piece in row["tokens"]][: len(rows)])
    tiles, caption = parse_tiles(row["tiles"]), Caption(name, str(row["prompt"]))
    return word_heatmaps(run.pictures(name, task), rows, tiles, words, steps=steps, caption=caption)


def _sample_with_tiles(run: Run, sample: str | None) -> dict[Hashable, Any]:
    rows = run.samples().to_dict("records")
    fits = (r for r in rows if r["tiles"] != "[]" and sample in (None, r["sample"]))
    chosen = next(fits, None)
    if chosen is None:
        raise UserError("the places of these samples' vision tokens in their pictures are not known")
    return chosen
