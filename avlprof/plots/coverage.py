"""How few vision tokens hold most of each layer's vision attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from avlprof.plots.frames import (
    NO_VISION,
    Array,
    HalfWidths,
    half_widths,
    joined,
    need,
    samples_note,
    table,
)
from avlprof.plots.style import (
    LEGEND_LAYERS,
    SOFT,
    interval_band,
    layer_colours,
    layer_key,
    layer_lines,
    new_figure,
    percent_axis,
    share_log_axis,
    theme,
)

if TYPE_CHECKING:
    from avlprof.analysis.profile import Profile

TITLES = {"last": "Last prompt token", "step": "One decoding step", "answer": "All steps of an answer"}


@dataclass(frozen=True)
class CoveragePanel:
    """Curves of one kind of query row: `attention [layers, points]` over `kept [points]`, both shares.

    All panels have the same layers, so that a colour is one layer; NaN where one never looks.

    `low` and `high [layers, points]` bound the 95% interval (NaN: not known).
    """

    title: str
    layers: tuple[int, ...]
    kept: Array
    attention: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class CoverageInfo:
    """What `coverage_curves` draws: a panel per kind of query row.

    `halves` says how wide the 95% intervals are, for figures with too many layers to draw them.
    """

    panels: tuple[CoveragePanel, ...]
    halves: HalfWidths
    note: str


def coverage_info(frame: pd.DataFrame) -> CoverageInfo:
    """Share of vision attention held by the best share of vision tokens, from one token on.

    Args:
        frame: `profile["coverage_curve"]`: `layer, query, share_kept, mean, low, high` (and `n`).

    Raises:
        UserError: a column is missing, or no traced sample has vision tokens.
    """
    need(frame, ("layer", "query", "share_kept", "mean", "low", "high"), "coverage curves", NO_VISION)
    frame = need(frame[frame["query"].isin(list(TITLES))], (), "coverage curves", NO_VISION)
    panels, layers = [], sorted({int(layer) for layer in frame["layer"]})
    for query, title in TITLES.items():
        part = frame[frame["query"] == query]
        if part.empty:
            continue
        wide = [table(part, "layer", "share_kept", name) for name in ("mean", "low", "high")]
        columns = wide[0].columns
        mean, low, high = (one.reindex(index=layers, columns=columns).to_numpy(dtype=float) for one in wide)
        kept = columns.to_numpy(dtype=float)
        panels.append(CoveragePanel(title, tuple(layers), kept, mean, low, high))
    return CoverageInfo(tuple(panels), half_widths(frame), samples_note(frame))


def coverage_curves(source: Profile | CoverageInfo) -> Figure:
    """A line per layer: how much of its vision attention the best share of vision tokens holds.

    The share is on a log scale, since most layers need few tokens. The further above the dashed
    line (even attention) a layer is, the sparser it is.
    """
    info = source if isinstance(source, CoverageInfo) else coverage_info(source["coverage_curve"])
    with theme():
        bands = len(info.panels[0].layers) <= LEGEND_LAYERS
        known = np.isfinite(info.halves.widest)
        note = joined(
            info.note, "bands: 95% interval" if bands and known else "" if bands else info.halves.words()
        )
        size = (3.4 + 3.5 * len(info.panels), 5.6)
        figure = new_figure("How few vision tokens each layer needs", note, size)
        axes = list(figure.subplots(1, len(info.panels), sharey=True, squeeze=False)[0])
        for panel, ax in zip(info.panels, axes, strict=True):
            _draw(panel, ax, bands)
        axes[0].set_ylabel("Share of vision attention held")
        layer_key(figure, axes, info.panels[0].layers)
        return figure


def _draw(panel: CoveragePanel, ax: Axes, bands: bool) -> None:
    least = min(float(panel.kept[0]), 0.5)
    even = np.geomspace(least, 1.0, 64)
    ax.plot(even, even, color=SOFT, linewidth=1.4, linestyle=(0, (4, 3)))
    behind = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8}
    ax.annotate(
        "even",
        (0.35, 0.35),
        (-7, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        color=SOFT,
        fontsize=12,
        bbox=behind,
        zorder=6,
    )
    colours = layer_colours(panel.layers)
    layer_lines(ax, panel.layers, panel.kept, panel.attention, linewidth=2.2 if bands else 1.4)
    if bands:
        for low, high, colour in zip(panel.low, panel.high, colours, strict=True):
            interval_band(ax, panel.kept, np.clip(low, 0.0, 1.0), np.clip(high, 0.0, 1.0), colour)
    ax.set_title(panel.title)
    ax.set_xlabel("Share of vision tokens\n(log scale)")
    percent_axis(ax, "y")
    share_log_axis(ax, least)
