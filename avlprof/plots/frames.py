"""Reading the tidy frames that figures are drawn from."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from avlprof.errors import UserError

Array = NDArray[np.float64]


def need(frame: pd.DataFrame, columns: Sequence[str], figure: str) -> pd.DataFrame:
    """The frame, after a check that it has rows and these columns.

    Raises:
        UserError: a column is missing, or there is no row.
    """
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        have = ", ".join(str(name) for name in frame.columns)
        raise UserError(f"figure '{figure}' needs the column '{missing[0]}', the frame has: {have}")
    if frame.empty:
        raise UserError(
            f"figure '{figure}' has nothing to draw: the frame is empty; trace some samples first"
        )
    return frame


def need_vision(known: bool, figure: str) -> None:
    """`UserError` when nothing about vision tokens was measured."""
    if not known:
        raise UserError(
            f"figure '{figure}' needs vision tokens, but no traced sample has any; use prompts with an image"
        )


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
