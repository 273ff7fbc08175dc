"""Reading the tidy frames that figures are drawn from."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
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


def samples_note(frame: pd.DataFrame) -> str:
    """`mean over n samples` when the frame says how many, else an empty text."""
    if "n" not in frame.columns or frame["n"].isna().all():
        return ""
    count = int(frame["n"].max())
    return f"mean over {count:,} sample{'s' if count != 1 else ''}"


def typical_half(frame: pd.DataFrame) -> float:
    """Median half width of the 95% intervals of a frame; NaN where none is known."""
    half = ((frame["high"] - frame["low"]) / 2).dropna()
    return float(half.median()) if len(half) else float("nan")


def whole_layers(index: pd.Index[Any]) -> tuple[int, ...]:
    """Layers as plain numbers."""
    return tuple(int(layer) for layer in index)


def joined(*texts: str, by: str = ", ") -> str:
    """The texts that are not empty, in one."""
    return by.join(text for text in texts if text)
