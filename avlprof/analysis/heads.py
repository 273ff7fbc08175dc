"""The same numbers head by head, where a run recorded heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from avlprof.analysis.intervals import Moments

STATISTICS = {
    "mass_system": "system",
    "mass_vision": "vision",
    "mass_text": "text",
    "mass_generated": "generated",
    "mass_sink": "sink",
    "text_sink": "text_sink",
    "entropy": "entropy",
}
KINDS = (
    ("decode", "generated"),
    ("prefill", "last"),
    ("prefill", "system"),
    ("prefill", "text"),
    ("prefill", "vision"),
)
COLUMNS = ("layer", "head", "phase", "query", "statistic", "mean", "low", "high", "n")


class HeadMoments:
    """Running means over samples of single heads; takes the `stats` table of a part at a time."""

    def __init__(self, layers: int, heads: int, levels: Sequence[int], lags: Sequence[int]) -> None:
        self._covered = [f"coverage_{level}" for level in levels]
        self._columns = [*STATISTICS, *self._covered, *(f"overlap_{lag}" for lag in lags)]
        self._shape = (layers, heads, len(KINDS), len(self._columns))
        self._moments = Moments(self._shape)

    def add(self, stats: pd.DataFrame, vision: pd.Series[int]) -> None:
        """Take the samples of a table; rows of head averages (`head` -1) are left out.

        `vision` is the number of vision tokens by sample id.
        """
        ours = stats[stats["head"] >= 0].copy()
        if ours.empty:
            return
        count = ours["sample"].map(vision)
        ours[self._covered] = ours[self._covered].div(count.where(count > 0), axis=0)
        sample, names = pd.factorize(ours["sample"])
        kind = pd.Series(range(len(KINDS)), index=pd.MultiIndex.from_tuples(KINDS))
        place = kind.reindex(pd.MultiIndex.from_frame(ours[["phase", "query"]])).to_numpy()
        values = np.full((len(names), *self._shape), np.nan)
        values[sample, ours["layer"], ours["head"], place] = ours[self._columns]
        for one in values:
            self._moments.add(one)

    def table(self) -> pd.DataFrame:
        """`layer, head, phase, query, statistic, mean, low, high, n`; no row in a run of head averages.

        `statistic` is a modality, `sink` or `text_sink` (share of attention on it, on the first
        token, on the first text tokens), `entropy` (nat), `coverage_<level>` (share of the vision
        tokens) or `overlap_<lag>` (share of the head's top set).
        """
        layers, heads, kinds, _ = self._shape
        axes = {"layer": range(layers), "head": range(heads), "kind": range(kinds)}
        table = self._moments.table(
            axes | {"statistic": [STATISTICS.get(name, name) for name in self._columns]}
        )
        names = pd.DataFrame(KINDS, columns=["phase", "query"]).loc[table["kind"]].reset_index(drop=True)
        return pd.concat([table.drop(columns="kind"), names], axis=1)[list(COLUMNS)]
