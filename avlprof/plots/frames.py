"""Reading the tidy frames that figures are drawn from."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from avlprof.errors import UserError

Array = NDArray[np.float64]

NO_ROWS = "the frame is empty; trace some samples first"
NO_VISION = "no traced sample has vision tokens; use prompts with an image"


def need(frame: pd.DataFrame, columns: Sequence[str], figure: str, empty: str = NO_ROWS) -> pd.DataFrame:
    """The frame, after a check that it has rows and these columns.

    Raises:
        UserError: a column is missing, or there is no row (and `empty` says why and what to do).
    """
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        have = ", ".join(str(name) for name in frame.columns)
        raise UserError(f"figure '{figure}' needs the column '{missing[0]}', the frame has: {have or 'none'}")
    if frame.empty:
        raise UserError(f"figure '{figure}' has nothing to draw: {empty}")
    return frame


def table(frame: pd.DataFrame, rows: Hashable, columns: Hashable, values: str) -> pd.DataFrame:
    """Means of `values` by `rows` and `columns`, both sorted; NaN where there is none."""
    wide = frame.pivot_table(index=rows, columns=columns, values=values, aggfunc="mean", dropna=False)
    return wide.sort_index().sort_index(axis=1)


def count_range(counts: pd.Series[Any]) -> str:
    """`7`, or `5 to 7` when counts differ: the largest alone would promise too much."""
    least, most = int(counts.min()), int(counts.max())
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def samples_note(frame: pd.DataFrame) -> str:
    """`mean over n samples` when the frame says how many, else an empty text."""
    if "n" not in frame.columns or frame["n"].isna().all():
        return ""
    count = count_range(frame["n"].dropna())
    return f"mean over {count} sample{'s' if count != '1' else ''}"


@dataclass(frozen=True)
class HalfWidths:
    """Half widths of many 95% intervals: the median and the widest; NaN where none is known."""

    median: float
    widest: float

    def words(self, unit: str = "points", factor: float = 100.0) -> str:
        """`95% intervals: ±0.2 points in the median, ±11 at worst`; empty when not known."""
        if np.isnan(self.widest):
            return ""
        median, widest = (_plus_minus(factor * half) for half in (self.median, self.widest))
        if median == widest:
            return f"95% intervals: {widest} {unit}"
        return f"95% intervals: {median} {unit} in the median, {widest} at worst"


def _plus_minus(half: float) -> str:
    if half < 0.01:
        return "±0" if half == 0 else "below ±0.01"
    return f"±{half:.0f}" if half >= 10 else f"±{half:.2g}"


def half_widths(frame: pd.DataFrame) -> HalfWidths:
    """How wide the intervals of a frame are, by its columns `low` and `high`."""
    half = ((frame["high"] - frame["low"]) / 2).dropna()
    return HalfWidths(float(half.median()), float(half.max()))


def whole_layers(index: pd.Index[Any]) -> tuple[int, ...]:
    """Layers as plain numbers."""
    return tuple(int(layer) for layer in index)


def joined(*texts: str, by: str = ", ") -> str:
    """The texts that are not empty, in one."""
    return by.join(text for text in texts if text)


def byte_unit(most: float) -> tuple[int, str]:
    """Bytes of the unit in which sizes up to `most` bytes are read well, and its name."""
    return (1 << 20, "MiB") if most >= 1 << 24 else (1 << 10, "KiB")
