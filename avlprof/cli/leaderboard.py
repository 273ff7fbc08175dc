"""`avlprof leaderboard`: one table and front out of the results of several people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    size,
)
from avlprof.cli._progress import bars
from avlprof.files import check_output

if TYPE_CHECKING:
    from avlprof.evaluation.leaderboard import Group, Leaderboard

app = typer.Typer(add_completion=False)


@app.command()
def leaderboard(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Files of 'compare --submit'.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder; by default leaderboard within FOLDER.")
    ] = None,
    form: FormatOption = Format.table,
    figure_format: FigureFormatOption = FigureFormat.png,
) -> None:
    """Check results that others sent, and rank what may be compared: one model, asked the same.

    Writes leaderboard.md, leaderboard.csv and a figure a group. What does not hold together is named
    and set aside.
    """
    from avlprof.evaluation.leaderboard import Leaderboard

    place = out or folder / "leaderboard"
    check_output(place, folder=True)
    with bars() as watch:
        board = Leaderboard.of(folder, watch)
    wrote = _write(board, place, figure_format)
    if form is not Format.table:
        show(records(board.table()), form)
    else:
        for group in board.groups:
            _print(group)
    for name, why in board.set_aside:
        note(f"set aside: {name}: {why}")
    finished(wrote)


def _write(board: Leaderboard, place: Path, suffix: str) -> list[Path]:
    from avlprof.evaluation.leaderboard import clean
    from avlprof.files import write_text
    from avlprof.plots.save import save_figure
    from avlprof.plots.scores import scores_by_bytes

    figures = []
    for group in board.groups:
        metric = clean(group.first.task.metric)
        figure = scores_by_bytes(group.table, group.title, f"Score ({metric})")
        figures.append(save_figure(figure, place / group.name, suffix))
    pages = {
        "leaderboard.md": board.markdown([path.name for path in figures]),
        "leaderboard.csv": board.csv(),
    }
    for name, text in pages.items():
        write_text(place / name, text)
    return [*(place / name for name in pages), *figures]


def _print(group: Group) -> None:
    from avlprof.evaluation.leaderboard import said_difference

    rows: list[dict[str, Any]] = [
        {
            "budget": row["budget"],
            "#": row["rank"],
            "method": row["method"],
            "by": row["by"] or "-",
            "score": f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
            "behind": said_difference(row, "behind"),
            "vs dense": said_difference(row, "vs_dense"),
            "live_share": row["live_share"],
            "read_share": row["read_share"],
            "live_bytes": row["live_bytes"],
        }
        for row in records(group.table)
    ]
    shares = dict.fromkeys(("budget", "live_share", "read_share"), percent)
    rank = {"#": lambda value: "-" if value is None else f"{value:.0f}"}
    show(rows, Format.table, group.title, {**shares, **rank, "live_bytes": size})
