"""Statistics of heads averaged, so that a layer of a sample is one row for each kind of query row."""

from __future__ import annotations

import numpy as np
import pandas as pd

ROW = ["sample", "layer", "phase", "query"]


def head_mean(stats: pd.DataFrame) -> pd.DataFrame:
    """A run's `stats` with heads averaged: one row per `sample, layer, phase, query`.

    The lists of `distance` become columns `distance_0`, `distance_1`, ... NaN is left out of a
    mean.
    """
    numbers = stats.drop(columns=["head", "distance"])
    bins = np.stack(stats["distance"].to_list()).astype(np.float64)
    names = [f"distance_{i}" for i in range(bins.shape[1])]
    wide = pd.concat([numbers, pd.DataFrame(bins, columns=names, index=numbers.index)], axis=1)
    return wide.groupby(ROW, sort=False).mean().reset_index()
