"""How fast the attended set moves on while an answer is generated."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from avlprof.analysis.intervals import over_samples


def drift(rows: pd.DataFrame, lags: Sequence[int]) -> pd.DataFrame:
    """Overlap of a layer's top set with the one `lag` decoding steps before.

    `rows` is a table of `head_mean`. Returns `layer, lag, mean, low, high, n`; lags longer than
    every answer are left out.
    """
    columns = {f"overlap_{lag}": lag for lag in lags}
    steps = rows.loc[rows["phase"] == "decode", ["layer", *columns]].rename(columns=columns)
    long = steps.melt("layer", var_name="lag", value_name="overlap").astype({"lag": "int64"})
    return over_samples(long, ["layer", "lag"], "overlap")


def refresh_from_drift(table: pd.DataFrame, least: float = 0.5, shortest: int = 4) -> int:
    """A refresh interval from a table of `drift`: the longest lag up to which sets stay together.

    That is the last lag at which, as at all shorter ones, the overlap averaged over layers is
    `least` or more. Below `shortest` steps a refresh costs about what the core saves, so the
    interval is never shorter; it is 8 when answers were too short to show drift.
    """
    if table.empty:
        return 8
    together = (table.groupby("lag")["mean"].mean() >= least).cummin()
    longest: int = max(together.index[together], default=shortest)
    return max(shortest, int(longest))
