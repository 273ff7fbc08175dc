"""What a command prints: results on stdout, notes on stderr."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from avlprof.errors import counted

if TYPE_CHECKING:
    import pandas as pd

    from avlprof.analysis import Profile


class Format(StrEnum):
    """How a table of results is written."""

    table = "table"
    json = "json"
    csv = "csv"


FormatOption = Annotated[
    Format, typer.Option("--format", help="How to print the results.", rich_help_panel="Output")
]


class FigureFormat(StrEnum):
    """How figures are written."""

    png = "png"
    svg = "svg"
    pdf = "pdf"


FigureFormatOption = Annotated[
    FigureFormat, typer.Option("--figure-format", help="How to write figures.", rich_help_panel="Output")
]

Row = Mapping[str, Any]
Cells = Mapping[str, Callable[[Any], str]]


def show(
    rows: Sequence[Row], form: Format = Format.table, title: str = "", cells: Cells | None = None
) -> None:
    """Print rows with the same keys on stdout.

    A table is drawn on a terminal and is plain aligned text in a pipe; `cells` says how to write
    the values of some columns in it. JSON (a list of objects) and CSV hold the values as they
    are, NaN as null or nothing.
    """
    if form is Format.json:
        typer.echo(json.dumps([_plain(row) for row in rows], indent=2, ensure_ascii=False))
        return
    columns = list(rows[0]) if rows else []
    if form is Format.csv:
        writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_plain(row) for row in rows)
        return
    texts = [[(cells or {}).get(name, cell)(row[name]) for name in columns] for row in rows]
    numeric = [all(_is_number(row[name]) for row in rows) for name in columns]
    (_draw if sys.stdout.isatty() else _align)(columns, texts, numeric, title)


def note(message: str) -> None:
    """A line for the reader on stderr."""
    typer.echo(message, err=True)


def finished(wrote: Sequence[object], then: str = "") -> None:
    """The last lines of a command: where it wrote and what to run next, on stderr."""
    for path in wrote:
        note(f"wrote {path}")
    if then:
        note(f"next: {then}")


def cell(value: Any) -> str:
    """A value as a table shows it: short numbers, `-` where nothing is known."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list | tuple):
        return " ".join(cell(item) for item in value)
    return str(value)


def percent(value: Any) -> str:
    """A share as a percentage."""
    return cell(value) if value is None or math.isnan(value) else f"{100 * value:.1f}%"


def size(value: Any) -> str:
    """A number of bytes, in the largest binary unit below it."""
    if value is None or math.isnan(value):
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _plain(row: Row) -> dict[str, Any]:
    return {name: _unboxed(value) for name, value in row.items()}


def _unboxed(value: Any) -> Any:
    """A value of numpy or pandas as Python's own."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list | tuple):
        return [_unboxed(item) for item in value]
    return value


def _align(columns: list[str], texts: list[list[str]], numeric: list[bool], title: str) -> None:
    if title:
        typer.echo(title)
    lines = [columns, *texts]
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(len(columns))]
    for line in lines:
        padded = (
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        )
        typer.echo("  ".join(padded).rstrip())


def _draw(columns: list[str], texts: list[list[str]], numeric: list[bool], title: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title) or None, title_justify="left", box=box.SIMPLE_HEAD)
    for index, (name, right) in enumerate(zip(columns, numeric, strict=True)):
        side: Literal["left", "right"] = "right" if right else "left"
        table.add_column(escape(name), justify=side, overflow="fold", no_wrap=index == 0)
    for line in texts:
        table.add_row(*(escape(text) for text in line))
    Console().print(table)


SUMMARY = ("vision_last", "vision_decode", "coverage_90", "overlap_8", "to_the_end")
CellTexts = dict[str, Callable[[Any], str]]


def cells_of(what: str) -> CellTexts:
    """How to write the values of some columns of a frame."""
    texts: CellTexts = dict.fromkeys(SUMMARY, percent)
    if what == "horizon":
        texts |= dict.fromkeys(
            ("layer", "low", "high"), lambda layer: "none" if layer is None else str(layer)
        )
    return texts


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a frame; None for what is missing."""
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


def print_differences(here: Profile, other: Profile, form: Format) -> None:
    """What differs between two profiles: a short table a layer, or all of it as JSON or CSV."""
    table = here.diff(other)
    if form is not Format.table:
        show(records(table), form)
        return
    decoded = (table["query"] == "generated").any()
    query = "generated" if decoded else "last"
    columns = {
        "vision_last": ("last", "mass_vision", _points),
        "vision_decode": ("generated", "mass_vision", _points),
        "coverage_90": (query, "coverage_90", _points),
        "overlap_8": ("generated", "overlap_8", _points),
        "window_95": (query, "window_95", _change),
        "entropy": (query, "entropy", _change),
    }
    rows: list[dict[str, Any]] = [{"layer": layer} for layer in range(here.layers)]
    for name, (of, statistic, text) in columns.items():
        matching = table[(table["query"] == of) & (table["statistic"] == statistic)]
        by_layer = {int(row["layer"]): row for row in records(matching)}
        for layer, line in enumerate(rows):
            line[name] = _marked(by_layer.get(layer), text)
    show(rows, form, f"{here.meta.run} less {other.meta.run}")
    typer.echo(_how(here, other, table))
    note("every statistic with its interval: --format csv")


def _how(here: Profile, other: Profile, table: pd.DataFrame) -> str:
    if (table["how"] == "paired").all():
        samples = f"{counted(table['n'].max(), 'sample')} that both runs have, each compared with itself"
    else:
        samples = f"{counted(here.meta.samples, 'sample')} against {other.meta.samples} others"
    return f"{samples}; * the 95% interval excludes 0; pp: percentage points."


def _marked(row: Mapping[str, Any] | None, text: Callable[[float], str]) -> str:
    if row is None:
        return "-"
    low, high = row["low"], row["high"]
    sure = low is not None and high is not None and (low > 0.0 or high < 0.0)
    return text(row["mean"]) + ("*" if sure else " ")


def _points(change: float) -> str:
    return f"{round(100 * change, 1) + 0.0:+.1f}pp"  # never -0.0


def _change(change: float) -> str:
    return cell(0.0) if math.isclose(change, 0.0, abs_tol=1e-12) else f"{change:+.3g}"
