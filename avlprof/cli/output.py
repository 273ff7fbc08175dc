"""What a command prints: results on stdout, notes on stderr."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal

import typer


class Format(StrEnum):
    """How a table of results is written."""

    table = "table"
    json = "json"
    csv = "csv"


FormatOption = Annotated[
    Format, typer.Option("--format", help="How to print the results.", rich_help_panel="Output")
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
