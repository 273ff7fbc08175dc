"""`avlprof lens`: what vision tokens already say behind each layer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avlprof.cli._options import (
    ImageOption,
    PromptOption,
    model_options,
    parse_layers,
    refuse_beside_picture,
    task_options,
)
from avlprof.cli._output import (
    FigureFormat,
    FigureFormatOption,
    Format,
    FormatOption,
    finished,
    note,
    percent,
    records,
    show,
)
from avlprof.cli._progress import bars
from avlprof.errors import UserError, counted
from avlprof.files import check_output
from avlprof.models.spec import ModelSpec

if TYPE_CHECKING:
    from avlprof.analysis.lens import Lens
    from avlprof.tasks import Task
    from avlprof.tasks.spec import TaskSpec

app = typer.Typer(add_completion=False)


@app.command("lens")
@model_options
@task_options
def lens_command(
    context: typer.Context,
    spec: ModelSpec,
    source: TaskSpec,
    samples: Annotated[int, typer.Option("--samples", "-n", help="How many samples.")] = 16,
    split: Annotated[
        str | None, typer.Option("--split", help="Which split of the task; by default search.")
    ] = None,
    image: ImageOption = None,
    prompt: PromptOption = None,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Behind which layers, such as 0-5,8; by default all.")
    ] = None,
    top: Annotated[int, typer.Option("--top", help="Words kept of each patch and layer.")] = 5,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Samples that run together; changes no number.")
    ] = 1,
    sample: Annotated[
        str | None, typer.Option("--sample", help="Sample of the figures; by default the first.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder; by default lenses/<model>-<task>.")
    ] = None,
    form: FormatOption = Format.table,
    figure_format: FigureFormatOption = FigureFormat.png,
) -> None:
    """Read what each vision token says behind each layer, through the model's own final norm and head.

    On the embedded tasks the words are held to what the patches show. Words are kept in the output
    folder, so the same command resumes, and avlprof explore --lens shows them.
    """
    from avlprof.api.lens import LensSettings, lens
    from avlprof.run import picture_task

    own = bool(image) or prompt is not None
    if own:
        refuse_beside_picture(context)
    check_output(out, folder=True)
    settings = LensSettings(split=split, layers=parse_layers(layers), top=top, batch_size=batch_size)
    task = picture_task(image or [], prompt) if own else source.load()
    count = None if own else samples
    folder = out or Path("lenses") / re.sub(r"[^\w.-]+", "-", f"{Path(spec.name).name}-{task.name}")
    check_output(folder, folder=True)
    _check_sample(task, settings.split_of(task), count, sample)
    with bars(resumes=True) as watch:
        found = lens(spec, task, count, settings, out=folder, watch=watch)
    wrote = [folder, *_figures(found, task, folder, sample, figure_format)]
    _print(found, form)
    finished(wrote, f"avlprof explore RUN --lens {folder} (of a run of the same samples)")


def _check_sample(task: Task, split: str, count: int | None, sample: str | None) -> None:
    if sample is not None and sample not in {one.id for one in task.samples(split, count)}:
        raise UserError(f"sample '{sample}' is not among those read; give the id of one, or read more (-n)")


def _figures(found: Lens, task: Task, folder: Path, sample: str | None, suffix: str) -> list[Path]:
    """By layer, words over the sample's pictures, and the words of its last layer written down."""
    from avlprof.plots import save_figure
    from avlprof.plots.lens import lens_layers, lens_words

    wrote = [save_figure(lens_layers(found.by_layer(), len(found.samples)), folder / "lens-layers", suffix)]
    try:
        name = found.sample(sample).id
        shown = next(one for one in task.samples(found.meta["split"], len(found.samples)) if one.id == name)
        pictures = [picture for message in shown.messages() for picture in message.pictures()]
        for file, chosen in (("lens-words", None), ("lens-last", [found.layers[-1]])):
            wrote.append(save_figure(lens_words(found, pictures, name, chosen), folder / file, suffix))
    except UserError as error:
        note(f"no figure of words: {error}")
    return wrote


def _print(found: Lens, form: Format) -> None:
    frame = found.by_layer()
    if form is not Format.table:
        show(records(frame), form)
    else:
        title = f"{found.meta['model']} on {found.meta['task']}, {counted(len(found.samples), 'sample')}"
        rows = _rows(found)
        show(rows, form, title, {name: percent for name in rows[0] if name not in ("layer", "words")})
    for sentence in found.findings():
        typer.echo(sentence, err=form is not Format.table)


def _rows(found: Lens) -> list[dict[str, Any]]:
    """A row a layer: how often words are right and by chance, how settled they are, the commonest ones."""
    frame = found.by_layer()
    table = {(m, w): own.set_index("layer")["mean"] for (m, w), own in frame.groupby(["measure", "what"])}
    columns = {
        "names_it": ("thing", "own"),
        "by_chance": ("thing", "other"),
        "color": ("color", "own"),
        "object": ("object", "own"),
        "in_answer": ("answer", "own"),
        "in_others": ("answer", "other"),
        "probability": ("share", "own"),
        "settled": ("settled", "own"),
    }
    held = {name: table[key] for name, key in columns.items() if key in table}
    return [
        {
            "layer": layer,
            **{name: float(column.get(layer, float("nan"))) for name, column in held.items()},
            "words": " ".join(found.commonest(layer)),
        }
        for layer in found.layers
    ]
