"""How few vision tokens hold most of each layer's vision attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from avlprof.plots.frames import NO_VISION, Array, need, samples_note, table
from avlprof.plots.style import SOFT, layer_colours, layer_key, new_figure, percent_axis, theme

if TYPE_CHECKING:
    from avlprof.analysis.profile import Profile

TITLES = {"last": "Last prompt token", "step": "One decoding step", "answer": "All steps of an answer"}


@dataclass(frozen=True)
class CoveragePanel:
    """Curves of one kind of query row: `attention [layers, points]` over `kept [points]`, both shares."""

    title: str
    layers: tuple[int, ...]
    kept: Array
    attention: Array


@dataclass(frozen=True)
class CoverageInfo:
    """What `coverage_curves` draws: a panel per kind of query row."""

    panels: tuple[CoveragePanel, ...]
    note: str


def coverage_info(frame: pd.DataFrame) -> CoverageInfo:
    """Share of vision attention held by the best share of vision tokens, from (0, 0) on.

    Args:
        frame: `Profile.coverage_curve()`: `layer, query, share_kept, mean` (and `n`).

    Raises:
        UserError: a column is missing, or no traced sample has vision tokens.
    """
    need(frame, ("layer", "query", "share_kept", "mean"), "coverage curves", NO_VISION)
    frame = need(frame[frame["query"].isin(list(TITLES))], (), "coverage curves", NO_VISION)
    panels = []
    for query, title in TITLES.items():
        part = frame[frame["query"] == query]
        if part.empty:
            continue
        wide = table(part, "layer", "share_kept", "mean")
        curves = wide.to_numpy(dtype=float)
        kept = np.concatenate([[0.0], wide.columns.to_numpy(dtype=float)])
        start = np.zeros((len(curves), 1))
        panels.append(
            CoveragePanel(title, tuple(int(i) for i in wide.index), kept, np.hstack([start, curves]))
        )
    return CoverageInfo(tuple(panels), samples_note(frame))


def coverage_curves(source: Profile | CoverageInfo) -> Figure:
    """A line per layer: how much of its vision attention the best share of vision tokens holds.

    The further above the diagonal (even attention) a line is, the sparser its layer.
    """
    info = source if isinstance(source, CoverageInfo) else coverage_info(source.coverage_curve())
    with theme():
        figure = new_figure(
            "How few vision tokens each layer needs", info.note, (3.4 + 3.5 * len(info.panels), 5.6)
        )
        axes = list(figure.subplots(1, len(info.panels), sharey=True, squeeze=False)[0])
        for panel, ax in zip(info.panels, axes, strict=True):
            ax.plot([0, 1], [0, 1], color=SOFT, linewidth=1.4, linestyle=(0, (4, 3)))
            ax.text(0.66, 0.6, "even", color=SOFT, fontsize=11.5, rotation=45, ha="center", va="center")
            for curve, colour in zip(panel.attention, layer_colours(panel.layers), strict=True):
                ax.plot(panel.kept, curve, color=colour, linewidth=1.4 if len(panel.layers) > 12 else 2.2)
            ax.set_title(panel.title)
            ax.set_xlabel("Share of vision tokens")
            percent_axis(ax, "xy")
            ax.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
        axes[0].set_ylabel("Share of vision attention held")
        layer_key(figure, axes, info.panels[0].layers)
        return figure
