"""How far back in the text each layer reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from avlprof.plots.frames import (
    Array,
    HalfWidths,
    half_widths,
    joined,
    need,
    samples_note,
    table,
    whole_layers,
)
from avlprof.plots.style import (
    LEGEND_LAYERS,
    SOFT,
    interval_band,
    layer_colours,
    layer_key,
    layer_lines,
    log2_axis,
    new_figure,
    percent_axis,
    theme,
)

if TYPE_CHECKING:
    from avlprof.analysis.profile import Profile

SOURCES = (("decode", "generated", "generated tokens"), ("prefill", "last", "last prompt token"))


@dataclass(frozen=True)
class WindowInfo:
    """Text attention at distances below each of `windows` (tokens): `held [layers, windows]`, shares.

    `low` and `high [layers, windows]` bound the 95% interval of `held` (NaN: not known).
    `needed [layers]` is the smallest of the windows that holds `level` of it (NaN: none does).
    `halves` says how wide the intervals are, for figures with too many layers to draw them.
    """

    layers: tuple[int, ...]
    windows: tuple[int, ...]
    held: Array
    low: Array
    high: Array
    level: float
    needed: Array
    halves: HalfWidths
    rows: str
    note: str


def window_info(frame: pd.DataFrame, level: float = 0.95) -> WindowInfo:
    """Cumulative text attention by distance, of generated rows (of the last prompt row if none).

    Args:
        frame: `profile["window_curve"]`: `layer, phase, query, distance, mean, low, high` (and `n`).
        level: share of the text attention that a window is to hold.

    Raises:
        UserError: a column is missing, or nothing was traced.
    """
    need(frame, ("layer", "phase", "query", "distance", "mean", "low", "high"), "text window")
    for phase, query, rows in SOURCES:  # noqa: B007
        part = frame[(frame["phase"] == phase) & (frame["query"] == query)]
        if not part.empty:
            break
    need(part, (), "text window")
    tables = [table(part, "layer", "distance", name) for name in ("mean", "low", "high")]
    wide = tables[0]
    held, low, high = (one.reindex_like(wide).to_numpy(dtype=float) for one in tables)
    windows = wide.columns.to_numpy(dtype=float)
    enough = held >= level - 1e-9
    needed = np.where(enough.any(axis=1), windows[enough.argmax(axis=1)], np.nan)
    sizes = tuple(int(w) for w in windows)
    layers, halves = whole_layers(wide.index), half_widths(part)
    return WindowInfo(layers, sizes, held, low, high, level, needed, halves, rows, samples_note(part))


def text_window(source: Profile | WindowInfo) -> Figure:
    """A line per layer: the share of text attention within a window, and where it reaches the level."""
    info = source if isinstance(source, WindowInfo) else window_info(source["window_curve"])
    with theme():
        bands = len(info.layers) <= LEGEND_LAYERS
        known = np.isfinite(info.halves.widest)
        spread = ("bands: 95% interval" if known else "") if bands else info.halves.words()
        dots = f"dots: smallest traced window with {info.level:.0%}"
        note = joined(info.rows, "first text tokens aside", info.note, dots, spread, by="; ")
        figure = new_figure("How far back in the text each layer reaches", note, (11.0, 5.8))
        ax = figure.subplots()
        ax.axhline(info.level, color=SOFT, linewidth=1.4, linestyle=(0, (4, 3)))
        layer_lines(ax, info.layers, info.windows, info.held, linewidth=2.2 if bands else 1.4)
        lines = zip(info.held, info.low, info.high, info.needed, layer_colours(info.layers), strict=True)
        for line, low, high, window, colour in lines:
            if bands:
                interval_band(ax, info.windows, np.clip(low, 0.0, 1.0), np.clip(high, 0.0, 1.0), colour)
            if np.isfinite(window):
                share = line[info.windows.index(int(window))]
                size = 10 if bands else 7
                ax.plot([window], [share], "o", color=colour, markersize=size, mec="white", zorder=5)
        log2_axis(ax, [w for w in info.windows if w & (w - 1) == 0] or info.windows)
        percent_axis(ax, "y", full=False)
        ax.set_ylim(0.0, 1.03)
        ax.text(0.005, info.level + 0.01, f"{info.level:.0%}", color=SOFT, transform=ax.get_yaxis_transform())
        ax.set_xlabel("Text window (tokens, log scale)")
        ax.set_ylabel("Share of text attention held")
        layer_key(figure, ax, info.layers)
        return figure
