"""The same numbers head by head, where a run recorded heads."""

from __future__ import annotations

import numpy as np
import pandas as pd

from avlprof.analysis.intervals import Moments

STATISTICS = {"mass_vision": "vision", "mass_sink": "sink", "entropy": "entropy"}
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

    def __init__(self, layers: int, heads: int) -> None:
        self._shape = (layers, heads, len(KINDS), len(STATISTICS))
        self._moments = Moments(self._shape)

    def add(self, stats: pd.DataFrame) -> None:
        """Take the samples of a table; rows of head averages (`head` -1) are left out."""
        ours = stats[stats["head"] >= 0]
        sample, names = pd.factorize(ours["sample"])
        kind = pd.Series(range(len(KINDS)), index=pd.MultiIndex.from_tuples(KINDS))
        place = kind.reindex(pd.MultiIndex.from_frame(ours[["phase", "query"]])).to_numpy()
        values = np.full((len(names), *self._shape), np.nan)
        values[sample, ours["layer"], ours["head"], place] = ours[list(STATISTICS)]
        for one in values:
            self._moments.add(one)

    def table(self) -> pd.DataFrame:
        """`layer, head, phase, query, statistic, mean, low, high, n`; no row in a run of head averages.

        `statistic` is `vision` or `sink` (share of attention on vision and on the first token) or
        `entropy` (nat).
        """
        layers, heads, kinds, _ = self._shape
        axes = {"layer": range(layers), "head": range(heads), "kind": range(kinds)}
        table = self._moments.table(axes | {"statistic": list(STATISTICS.values())})
        names = pd.DataFrame(KINDS, columns=["phase", "query"]).loc[table["kind"]].reset_index(drop=True)
        return pd.concat([table.drop(columns="kind"), names], axis=1)[list(COLUMNS)]
