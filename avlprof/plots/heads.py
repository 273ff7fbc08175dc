"""Layers by heads: who looks at the picture, and who rests on the first token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from avlprof.plots.frames import Array, joined, need, samples_note, table, typical_half, whole_layers
from avlprof.plots.style import GRID, new_figure, theme

if TYPE_CHECKING:
    from avlprof.analysis.profile import Profile

TITLES = {
    "vision": "Attention on vision",
    "sink": "Attention on the first token",
    "entropy": "Row entropy",
    "shared": "Overlap with the set of the layer's mean",
    "others": "Overlap with another head, mean",
}
SHARES = ("vision", "sink")
SOURCES = (("decode", "generated", "generated tokens"), ("prefill", "last", "last prompt token"))
ANNOTATED = 12
LEAST_TOP = 0.1


@dataclass(frozen=True)
class HeadMap:
    """`values [layers, heads]` of one statistic: shares in [0, 1], or nat for `entropy`.

    Colours end at `top`.
    """

    statistic: str
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    values: Array
    top: float


@dataclass(frozen=True)
class HeadInfo:
    """What `draw_head_maps` draws; `half` is the typical half width of a share's 95% interval."""

    title: str

    maps: tuple[HeadMap, ...]
    rows: str
    half: float
    note: str


def head_info(frame: pd.DataFrame, statistics: tuple[str, ...] = SHARES) -> HeadInfo:
    """Statistics head by head, of generated rows (of the last prompt row if none).

    Args:
        frame: `profile["heads"]`: `layer, head, phase, query, statistic, mean, low, high` (and `n`).
        statistics: which of `vision`, `sink` and `entropy`, in this order.

    Raises:
        UserError: a column is missing, or nothing was traced head by head.
    """
    columns = ("layer", "head", "phase", "query", "statistic", "mean", "low", "high")
    need(frame, columns, "layers by heads", "the run holds averages over heads; trace with --per-head")
    for phase, query, rows in SOURCES:  # noqa: B007
        part = frame[(frame["phase"] == phase) & (frame["query"] == query)]
        if not part.empty:
            break
    maps = []
    for statistic in statistics:
        own = need(part[part["statistic"] == statistic], (), "layers by heads")
        wide = table(own, "layer", "head", "mean")
        values = wide.to_numpy(dtype=float)
        top = 1.0 if statistic == "vision" else float(np.nanmax(values)) or 1.0
        top = max(top, LEAST_TOP) if statistic in SHARES else top
        maps.append(HeadMap(statistic, whole_layers(wide.index), whole_layers(wide.columns), values, top))
    half = typical_half(part[part["statistic"].isin(SHARES)])
    return HeadInfo("What single heads do", tuple(maps), rows, half, samples_note(part))


def head_maps(source: Profile | HeadInfo, statistics: tuple[str, ...] = SHARES) -> Figure:
    """A map of layers by heads for each statistic.

    Raises:
        UserError: the run holds averages over heads only.
    """
    return draw_head_maps(source if isinstance(source, HeadInfo) else head_info(source["heads"], statistics))


def draw_head_maps(info: HeadInfo) -> Figure:
    """Maps of layers by heads, side by side."""
    with theme():
        typical = "" if np.isnan(info.half) else f"95% intervals: ±{100 * info.half:.1f} points, typically"
        note = joined(info.rows, info.note, typical)
        layers, heads = len(info.maps[0].layers), len(info.maps[0].heads)
        wide = min(max(0.55 * heads, 4.6), 6.0)
        tall = min(max(wide * layers / heads, 3.4), 8.5)
        size = (len(info.maps) * (wide + 1.3), tall + 1.7)
        figure = new_figure(info.title, note, size, square=True)
        axes = figure.subplots(1, len(info.maps), squeeze=False, sharey=True)[0]
        for one, ax in zip(info.maps, axes, strict=True):
            _draw(one, ax)
        axes[0].set_ylabel("Layer (0 = first)")
        return figure


def _draw(one: HeadMap, ax: Axes) -> None:
    share = one.statistic != "entropy"
    drawn = ax.imshow(one.values, vmin=0.0, vmax=one.top, cmap="cividis", aspect="auto")
    ax.set_title(TITLES[one.statistic])
    ax.set_xlabel("Query head")
    ax.grid(False)
    ax.set_facecolor(GRID)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if max(one.values.shape) <= ANNOTATED:
        ax.set_xticks(range(len(one.heads)), [str(head) for head in one.heads])
        ax.set_yticks(range(len(one.layers)), [str(layer) for layer in one.layers])
        for (row, col), value in np.ndenumerate(one.values):
            if np.isfinite(value):
                ink = "white" if value < 0.55 * one.top else "black"
                text = f"{100 * value:.0f}" if share else f"{value:.1f}"
                ax.text(col, row, text, ha="center", va="center", color=ink, fontsize=12)
    else:
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
    figure = ax.figure
    bar = figure.colorbar(drawn, ax=ax, pad=0.02, aspect=28)
    bar.outline.set_visible(False)
    if share:
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    else:
        bar.set_label("nat")
