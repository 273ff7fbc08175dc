"""How far back text attention reaches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from avlprof.analysis.intervals import over_samples
from avlprof.analysis.mass import KEYS

QUERIES = ("text", "last", "generated")


def reach(rows: pd.DataFrame, edges: Sequence[int], longest: int) -> pd.DataFrame:
    """Cumulative text attention of every sample by distance.

    Args:
        rows: a table of `head_mean`, with columns `distance_<i>`: mass at distances below
            `edges[i]` and not below the edge before, in text tokens; the last bin is open.
        edges: upper edges of the bins.
        longest: most text and generated tokens of a sample; it closes the last bin.

    Returns:
        `layer, phase, query` and one column a window in tokens: the share of the row's text mass,
        first tokens (sinks) aside, at distances below it. Rows without text mass are left out.
    """
    ours = rows[rows["query"].isin(QUERIES)]
    masses = ours[[f"distance_{i}" for i in range(len(edges) + 1)]].to_numpy(dtype=np.float64)
    total = masses.sum(axis=1)
    shares = masses[total > 0].cumsum(axis=1) / total[total > 0, None]
    windows = [*(edge for edge in edges if edge < longest), max(longest, 1)]
    held = np.column_stack([shares[:, : len(windows) - 1], np.ones(len(shares))])
    reached: pd.DataFrame = ours.loc[total > 0, KEYS].reset_index(drop=True)
    return reached.join(pd.DataFrame(held, columns=windows))


def window_curve(reached: pd.DataFrame) -> pd.DataFrame:
    """`layer, phase, query, distance, mean, low, high, n`: share of text mass below a distance.

    `reached` is a table of `reach`.
    """
    long = reached.melt(KEYS, var_name="distance", value_name="share").astype({"distance": "int64"})
    return over_samples(long, [*KEYS, "distance"], "share")


def window(reached: pd.DataFrame, levels: Sequence[int]) -> pd.DataFrame:
    """`layer, phase, query, level, mean, low, high, n`: smallest window in tokens holding `level` percent.

    Windows are edges of the distance histogram. `reached` is a table of `reach`.
    """
    windows = reached.columns.drop(KEYS)
    held = reached[windows].to_numpy()
    tables = []
    for level in levels:
        first = (held >= level / 100 - 1e-9).argmax(axis=1)
        found = reached[KEYS].assign(window=windows.to_numpy(dtype=np.float64)[first])
        table = over_samples(found, KEYS, "window")
        table.insert(len(KEYS), "level", level)
        tables.append(table)
    return pd.concat(tables, ignore_index=True).sort_values([*KEYS, "level"], ignore_index=True)
