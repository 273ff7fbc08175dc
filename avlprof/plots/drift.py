"""How fast the attended vision tokens change while an answer is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from avlprof.plots.frames import Array, joined, need, samples_note, table
from avlprof.plots.style import (
    INK,
    SOFT,
    layer_key,
    layer_lines,
    log2_axis,
    new_figure,
    percent_axis,
    plain_line,
    theme,
)

if TYPE_CHECKING:
    from avlprof.analysis.profile import Profile

THIN_LAYERS = 12
"""With more layers than this their lines are thin, so that the mean stands out."""


@dataclass(frozen=True)
class DriftInfo:
    """Overlap with the top set `lags` steps before: `overlap [layers, lags]`, and over layers.

    `mean [lags]` is the mean of the layers; `low` and `high` are the means of the layers' 95%
    interval ends, which is as wide as an interval of the mean can be (that of layers that err
    together).
    """

    layers: tuple[int, ...]
    lags: tuple[int, ...]
    overlap: Array
    mean: Array
    low: Array
    high: Array
    note: str


def drift_info(frame: pd.DataFrame) -> DriftInfo:
    """Overlap by layer and lag.

    Args:
        frame: `profile["drift"]`: `layer, lag, mean, low, high` (and `n`).

    Raises:
        UserError: a column is missing, or no answer was long enough or had vision tokens.
    """
    empty = "no traced answer about an image has two decoding steps; use prompts with longer answers"
    need(frame, ("layer", "lag", "mean", "low", "high"), "drift across steps", empty)
    wide = table(frame, "layer", "lag", "mean")
    ends = frame.groupby("lag")[["mean", "low", "high"]].mean().sort_index()
    mean, low, high = (ends[name].to_numpy(dtype=float) for name in ("mean", "low", "high"))
    return DriftInfo(
        tuple(int(i) for i in wide.index),
        tuple(int(i) for i in wide.columns),
        wide.to_numpy(dtype=float),
        mean,
        low,
        high,
        samples_note(frame),
    )


def step_drift(source: Profile | DriftInfo, top_share: float | None = None) -> Figure:
    """A line per layer over the number of decoding steps between, and their mean in black.

    Args:
        source: a profile, or the information.
        top_share: size of the sets as a share of the vision tokens (a profile knows it); it is
            also the overlap of random sets, drawn as the floor.
    """
    if not isinstance(source, DriftInfo):
        top_share = source.meta.settings.top_share
        source = drift_info(source["drift"])
    with theme():
        several, many = len(source.layers) > 1, len(source.layers) > THIN_LAYERS
        known = bool(np.isfinite(source.low).all())
        mean = f"black: mean of {len(source.layers)} layers" if several else ""
        band = "grey: its 95% interval, at its widest"
        band = (band if several else "band: 95% interval") if known else ""
        note = joined(source.note, mean, band)
        figure = new_figure("How fast the attended vision tokens change", note)
        ax = figure.subplots()
        look = {"linewidth": 1.6 if many else 2.2, "alpha": 0.6 if many else 0.9}
        layer_lines(ax, source.layers, source.lags, source.overlap, **look)
        if known:
            ax.fill_between(source.lags, source.low, source.high, color=INK, alpha=0.2, linewidth=0)
        if several:
            plain_line(ax, source.lags, source.mean, "black", linewidth=3.4, marker="o", zorder=5)
        if top_share is not None:
            ax.axhline(top_share, color=SOFT, linewidth=1.4, linestyle=(0, (4, 3)))
            where = ax.get_yaxis_transform()
            ax.text(0.005, top_share, "random sets", color=SOFT, fontsize=12, va="bottom", transform=where)
        log2_axis(ax, source.lags)
        percent_axis(ax, "y", full=False)
        highest = float(np.nanmax([np.nanmax(source.overlap), *source.high[np.isfinite(source.high)]]))
        ax.set_ylim(0.0, min(math.ceil(highest * 10 + 0.2) / 10, 1.0))
        sets = "top vision tokens" if top_share is None else f"top {top_share:.0%} vision tokens"
        ax.set_xlabel("Decoding steps between (log scale)")
        ax.set_ylabel(f"Overlap of {sets}")
        layer_key(figure, ax, source.layers)
        return figure
