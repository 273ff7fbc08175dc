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
    """What fits a terminal; the files have all intervals."""
    rows = records(group.table)
    named = any(row["by"] for row in rows)
    table = [
        {
            "budget": row["budget"],
            "#": row["rank"],
            "method": row["method"],
            **({"by": row["by"] or "-"} if named else {}),
            "score": f"{row['score']:.3f} [{row['low']:.2f}, {row['high']:.2f}]",
            "behind": _marked(row, "behind"),
            "vs dense": _marked(row, "vs_dense"),
            "KV": row["live_share"],
        }
        for row in rows
    ]
    rank = {"#": lambda value: "-" if value is None else f"{value:.0f}"}
    show(table, Format.table, group.title, {**rank, "budget": percent, "KV": percent})
    note("behind: the best of the budget; * the paired 95% interval excludes 0, not corrected for many rows")


def _marked(row: dict[str, Any], name: str) -> str:
    """A difference, with a star where these samples show it."""
    if row[name] is None:
        return "-"
    sure = row[f"{name}_low"] > 0.0 or row[f"{name}_high"] < 0.0
    return f"{row[name]:+.3f}{'*' if sure else ' '}"
