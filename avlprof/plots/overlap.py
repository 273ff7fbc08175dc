"""Do layers look at the same vision tokens? (PPCI)"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from avlprof.plots.frames import NO_VISION, Array, joined, need, samples_note, typical_half
from avlprof.plots.style import GRID, SOFT, new_figure, theme

if TYPE_CHECKING:
    from avlprof.analysis.profile import Profile

TITLES = {"last": "Last prompt token", "step": "One decoding step"}
ANNOTATED_LAYERS = 12


@dataclass(frozen=True)
class OverlapPanel:
    """`overlap [layers, layers]` in [0, 1] for one kind of query row; NaN where not measured."""

    title: str
    layers: tuple[int, ...]
    overlap: Array


@dataclass(frozen=True)
class OverlapInfo:
    """What `layer_overlap` draws.

    `apart` is the mean of each panel off the diagonal, `most` the largest value there of all panels
    (NaN for a single layer). `half` is the typical half width of the 95% intervals off the diagonal
    (NaN: not known).
    """

    panels: tuple[OverlapPanel, ...]
    apart: tuple[float, ...]
    most: float
    half: float
    note: str


def overlap_info(frame: pd.DataFrame) -> OverlapInfo:
    """PPCI matrices of layers.

    Args:
        frame: `profile["overlap"]`: `layer_a, layer_b, query, mean, low, high` (and `n`).

    Raises:
        UserError: a column is missing, or no traced sample has vision tokens.
    """
    need(frame, ("layer_a", "layer_b", "query", "mean", "low", "high"), "layer overlap", NO_VISION)
    frame = need(frame[frame["query"].isin(list(TITLES))], (), "layer overlap", NO_VISION)
    layers = sorted({int(i) for i in frame["layer_a"]} | {int(i) for i in frame["layer_b"]})
    panels, apart, most = [], [], float("nan")
    for query, title in TITLES.items():
        part = frame[frame["query"] == query]
        if part.empty:
            continue
        wide = part.pivot_table(index="layer_a", columns="layer_b", values="mean")
        matrix = wide.reindex(index=layers, columns=layers).to_numpy(dtype=float)
        others = matrix[~np.eye(len(layers), dtype=bool)]
        panels.append(OverlapPanel(title, tuple(layers), matrix))
        known = others[np.isfinite(others)]
        apart.append(float(known.mean()) if known.size else float("nan"))
        most = float(np.nanmax([most, *known])) if known.size else most
    half = typical_half(frame[frame["layer_a"] != frame["layer_b"]])
    return OverlapInfo(tuple(panels), tuple(apart), most, half, samples_note(frame))


def layer_overlap(source: Profile | OverlapInfo, top_share: float | None = None) -> Figure:
    """Heatmaps: the share of one layer's top vision tokens that are another layer's too.

    The diagonal is 100% by definition and left grey, so that colours tell the others apart.

    Args:
        source: a profile, or the information.
        top_share: size of the sets as a share of the vision tokens, for the labels (a profile
            knows it); it is also the overlap of random sets.
    """
    if not isinstance(source, OverlapInfo):
        top_share = source.meta.settings.top_share
        source = overlap_info(source["overlap"])
    with theme():
        chance = "" if top_share is None else f"random sets would overlap by {top_share:.0%}"
        typical = (
            "" if np.isnan(source.half) else f"95% intervals: ±{100 * source.half:.1f} points, typically"
        )
        note = joined(source.note, chance, typical)
        size = (1.9 + 4.7 * len(source.panels), 6.0)
        figure = new_figure("Do layers look at the same vision tokens?", note, size, square=True)
        axes = list(figure.subplots(1, len(source.panels), squeeze=False, sharey=True)[0])
        top = 1.0 if np.isnan(source.most) else min(math.ceil(source.most * 10 + 1e-9) / 10, 1.0) or 0.1
        for panel, mean, ax in zip(source.panels, source.apart, axes, strict=True):
            others = np.where(np.eye(len(panel.layers), dtype=bool), np.nan, panel.overlap)
            drawn = ax.imshow(others, vmin=0.0, vmax=top, cmap="cividis")
            _label(panel, ax, top)
            ax.set_title(panel.title if np.isnan(mean) else f"{panel.title} (mean {mean:.0%})")
        axes[0].set_ylabel("Layer (0 = first)")
        bar = figure.colorbar(drawn, ax=axes, pad=0.02, aspect=28)
        bar.set_label(
            "PPCI of top vision tokens" if top_share is None else f"PPCI of top {top_share:.0%} sets"
        )
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        bar.outline.set_visible(False)
        return figure


def _label(panel: OverlapPanel, ax: Axes, top: float) -> None:
    ax.grid(False)
    ax.set_facecolor(GRID)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.tick_params(length=0)
    ax.set_xlabel("Layer (0 = first)")
    if len(panel.layers) > ANNOTATED_LAYERS:
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
        return
    ax.set_xticks(range(len(panel.layers)), [str(i) for i in panel.layers])
    ax.set_yticks(range(len(panel.layers)), [str(i) for i in panel.layers])
    for (row, col), value in np.ndenumerate(panel.overlap):
        if np.isfinite(value):
            ink = SOFT if row == col else "white" if value < 0.55 * top else "black"
            ax.text(col, row, f"{100 * value:.0f}", ha="center", va="center", color=ink, fontsize=12)
