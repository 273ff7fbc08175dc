"""One row for each sample, layer and kind of query row: what all means over samples are made of."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from avlprof.analysis.head_mean import ROW
from avlprof.analysis.window import smallest_windows

MASSES = ("mass_system", "mass_vision", "mass_text", "mass_generated", "mass_sink", "text_sink")


def by_sample(
    rows: pd.DataFrame,
    vision: pd.Series[int],
    reached: pd.DataFrame,
    levels: Sequence[int],
    lags: Sequence[int],
) -> pd.DataFrame:
    """The statistics of single samples, fp32.

    Args:
        rows: a table of `head_mean`.
        vision: vision tokens by sample id.
        reached: a table of `window.reach`.
        levels: percentages of coverage and of windows.
        lags: decoding steps between two top sets.

    Returns:
        `sample, layer, phase, query` and one column a statistic: the masses (shares of
        attention), `entropy` (nat), `coverage_<level>` (share of the sample's vision tokens),
        `window_<level>` (text tokens), `overlap_<lag>` (share). NaN is not recorded.
    """
    covered = [f"coverage_{level}" for level in levels]
    found = rows[[*ROW, *MASSES, "entropy", *covered, *(f"overlap_{lag}" for lag in lags)]].copy()
    count = found["sample"].map(vision)
    found[covered] = found[covered].div(count.where(count > 0), axis=0)
    found = found.merge(smallest_windows(reached, levels), on=ROW, how="left")
    return found.astype({name: "float32" for name in found.columns.drop(ROW)})
