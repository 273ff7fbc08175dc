"""Text windows that hold a share of attention, and the statistics of single samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from avlprof.analysis.intervals import over_samples
from avlprof.analysis.tables import KEYS, ROW
from avlprof.runs.meta import LEARNED_SINK

QUERIES = ("text", "last", "generated")
ROUNDING = 1e-6  # masses are stored in fp32, so a share may miss a level by as much


def reach(rows: pd.DataFrame, edges: Sequence[int], longest: int) -> pd.DataFrame:
    """Cumulative text attention of every sample by distance.

    Args:
        rows: a table of `head_mean`, with columns `distance_<i>`: mass at distances below
            `edges[i]` and not below the edge before, in text tokens; the last bin is open.
        edges: upper edges of the bins.
        longest: most text and generated tokens of a sample; it closes the last bin.

    Returns:
        `sample, layer, phase, query` and one column a window in tokens: the share of the row's text
        mass, first tokens (sinks) aside, at distances below it. Rows without text mass are left out.
    """
    ours = rows[rows["query"].isin(QUERIES)]
    masses = ours[[f"distance_{i}" for i in range(len(edges) + 1)]].to_numpy(dtype=np.float64)
    total = masses.sum(axis=1)
    shares = masses[total > 0].cumsum(axis=1) / total[total > 0, None]
    windows = [*(edge for edge in edges if edge < longest), max(longest, 1)]
    cumulative = np.column_stack([shares[:, : len(windows) - 1], np.ones(len(shares))])
    reached: pd.DataFrame = ours.loc[total > 0, ROW].reset_index(drop=True)
    return reached.join(pd.DataFrame(cumulative, columns=windows))


def window_curve(reached: pd.DataFrame) -> pd.DataFrame:
    """`layer, phase, query, distance, mean, low, high, n`: share of text mass below a distance.

    `reached` is a table of `reach`.
    """
    long = reached.melt(ROW, var_name="distance", value_name="share").astype({"distance": "int64"})
    return over_samples(long, [*KEYS, "distance"], "share")


def smallest_windows(reached: pd.DataFrame, levels: Sequence[int]) -> pd.DataFrame:
    """`sample, layer, phase, query` and `window_<level>`: smallest window in tokens holding `level` percent.

    Windows are edges of the distance histogram. `reached` is a table of `reach`.
    """
    windows = reached.columns.drop(ROW)
    shares = reached[windows].to_numpy()
    smallest = reached[ROW].copy()
    for level in levels:
        first = (shares >= level / 100 - ROUNDING).argmax(axis=1)
        smallest[f"window_{level}"] = windows.to_numpy(dtype=np.float64)[first]
    return smallest


def window(reached: pd.DataFrame, levels: Sequence[int]) -> pd.DataFrame:
    """`layer, phase, query, level, mean, low, high, n`: the `smallest_windows` of the samples."""
    smallest = smallest_windows(reached, levels)
    tables = []
    for level in levels:
        table = over_samples(smallest, KEYS, f"window_{level}")
        table.insert(len(KEYS), "level", level)
        tables.append(table)
    return pd.concat(tables, ignore_index=True).sort_values([*KEYS, "level"], ignore_index=True)


def windows_for(curve: pd.DataFrame, share: float, layers: int) -> tuple[int, ...]:
    """Per layer, the smallest recorded window whose mean share of text mass is `share` or more.

    `curve` is a table of `window_curve`. Generated rows count, or the last prompt row in a run
    without decoding. A layer that never looked at text beyond the sinks gets a window of one token.
    """
    query = "generated" if (curve["query"] == "generated").any() else "last"
    enough = curve[(curve["query"] == query) & (curve["mean"] >= share - ROUNDING)]
    first = enough.groupby("layer")["distance"].min()
    return tuple(int(first.get(layer, 1)) for layer in range(layers))


MODALITIES = ("mass_system", "mass_vision", "mass_text", "mass_generated")
MASSES = (*MODALITIES, "mass_sink", LEARNED_SINK, "text_sink")


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
    table = rows[[*ROW, *MASSES, "entropy", *covered, *(f"overlap_{lag}" for lag in lags)]].copy()
    count = table["sample"].map(vision)
    table[covered] = table[covered].div(count.where(count > 0), axis=0)
    table = table.merge(smallest_windows(reached, levels), on=ROW, how="left")
    return table.astype({name: "float32" for name in table.columns.drop(ROW)})
