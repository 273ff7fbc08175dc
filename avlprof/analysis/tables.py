"""Per-layer tables of what was recorded: modality mass, sinks, drift, means over heads, and samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from avlprof.analysis.intervals import over_samples
from avlprof.runs import RunDirectory
from avlprof.runs.meta import LEARNED_SINK

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


ALWAYS = ("mass_system", "mass_vision", "mass_text", "mass_generated", "mass_sink", "entropy")
"""Columns of `stats` that hold a finite number in every row of a sound run."""


def not_finite(run: RunDirectory) -> set[str]:
    """Ids of samples whose attention holds a number that is not finite: NaN never means "no vision"."""
    broken: set[str] = set()
    for stats in run.stats_by_part(["sample", *ALWAYS]):
        unsound = ~np.isfinite(stats[list(ALWAYS)].to_numpy(dtype=np.float64)).all(axis=1)
        broken |= set(stats.loc[unsound, "sample"])
    return broken


KEYS = ["layer", "phase", "query"]


def mass(rows: pd.DataFrame) -> pd.DataFrame:
    """Share of attention by modality: `layer, phase, query, modality, mean, low, high, n`.

    `rows` is a table of `head_mean`. The means of one layer and query sum to 1. What the model's
    learned attention sinks drew is a modality `learned_sink`, which models without do not have.
    """
    columns = {f"mass_{name}": name for name in ("system", "vision", "text", "generated", "learned_sink")}
    if not rows[LEARNED_SINK].any():
        del columns[LEARNED_SINK]
    long = rows[[*KEYS, *columns]].rename(columns=columns).melt(KEYS, var_name="modality", value_name="mass")
    return over_samples(long, [*KEYS, "modality"], "mass")


def entropy(rows: pd.DataFrame) -> pd.DataFrame:
    """Row entropy in nat: `layer, phase, query, mean, low, high, n`; `rows` as in `mass`."""
    return over_samples(rows, KEYS, "entropy")


SINKS = {"mass_sink": "first", "text_sink": "text"}


def sinks(rows: pd.DataFrame) -> pd.DataFrame:
    """Share of attention on sinks: `layer, phase, query, sink, mean, low, high, n`.

    `sink` is `first` (the first token of the prompt) or `text` (the first text tokens, `text_sink`
    of them in the run's settings); `rows` is a table of `head_mean`.
    Source: attention sinks of StreamingLLM, arXiv 2309.17453.
    """
    long = rows[[*KEYS, *SINKS]].rename(columns=SINKS).melt(KEYS, var_name="sink", value_name="mass")
    return over_samples(long, [*KEYS, "sink"], "mass")


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
