"""Frames of a profile as rows of a table in the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import typer

from avlprof.cli.output import Format, cell, note, percent, show

if TYPE_CHECKING:
    import pandas as pd

    from avlprof.analysis import Profile

SUMMARY = ("vision_last", "vision_decode", "coverage_90", "overlap_8", "to_the_end")
Cells = dict[str, Callable[[Any], str]]


def cells_of(what: str) -> Cells:
    """How to write the values of some columns of a frame."""
    found: Cells = dict.fromkeys(SUMMARY, percent)
    if what == "horizon":
        found |= dict.fromkeys(
            ("layer", "low", "high"), lambda layer: "none" if layer is None else str(layer)
        )
    return found


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
        found = table[(table["query"] == of) & (table["statistic"] == statistic)]
        by_layer = {int(row["layer"]): row for row in records(found)}
        for layer, line in enumerate(rows):
            line[name] = _marked(by_layer.get(layer), text)
    show(rows, form, f"{here.meta.run} less {other.meta.run}")
    typer.echo(_how(here, other, table))
    note("every statistic with its interval: --format csv")


def _how(here: Profile, other: Profile, table: pd.DataFrame) -> str:
    if (table["how"] == "paired").all():
        samples = f"{table['n'].max()} samples that both runs have, each compared with itself"
    else:
        samples = f"{here.meta.samples} samples against {other.meta.samples} others"
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
