"""The layer beyond which vision carries no mass, and how it is found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from avlprof.analysis.intervals import over_samples
from avlprof.plots.frames import NO_VISION, Array, joined, need, samples_note, whole_layers
from avlprof.plots.mass import Horizon, horizons
from avlprof.plots.style import (
    INK,
    MARKERS,
    OKABE_ITO,
    SOFT,
    interval_band,
    layer_axis,
    nested,
    new_figure,
    percent_axis,
    plain_line,
    theme,
)

if TYPE_CHECKING:
    from avlprof.analysis.profile import Profile

ROWS = {"text": "Text of the prompt", "last": "Last prompt token", "generated": "Generated tokens"}
LOOKS = tuple(zip((OKABE_ITO[4], OKABE_ITO[0], OKABE_ITO[2]), MARKERS, strict=False))
MARKED_LAYERS = 24
BELOW = 20
"""The axis ends at this part of the threshold."""


@dataclass(frozen=True)
class HorizonLine:
    """Vision's `share [layers]` of the attention of one kind of row, with its 95% interval, and horizon."""

    title: str
    layers: tuple[int, ...]
    share: Array
    low: Array
    high: Array
    horizon: Horizon


@dataclass(frozen=True)
class HorizonInfo:
    """What `vision_horizon` draws: a line per kind of row, and the threshold."""

    lines: tuple[HorizonLine, ...]
    threshold: float
    note: str


def horizon_info(vision: pd.DataFrame, horizon: pd.DataFrame, threshold: float) -> HorizonInfo:
    """Vision mass by layer beside the horizon that it gives.

    Args:
        vision: `layer, query, mean, low, high` (and `n`): share of attention on vision, of
            samples with vision tokens.
        horizon: `Profile.horizon(threshold)`.
        threshold: share of attention below which vision counts as not looked at.

    Raises:
        UserError: a column is missing, or no traced sample has vision tokens.
    """
    need(vision, ("layer", "query", "mean", "low", "high"), "vision horizon", NO_VISION)
    need(horizon, ("query", "layer", "low", "high"), "vision horizon", NO_VISION)
    marks, lines = horizons(horizon), []
    for query, title in ROWS.items():
        part = vision[vision["query"] == query].sort_values("layer")
        if len(part) and query in marks:
            mean, low, high = (part[name].to_numpy(dtype=float) for name in ("mean", "low", "high"))
            layers = whole_layers(pd.Index(part["layer"]))
            lines.append(HorizonLine(title, layers, mean, low, high, marks[query]))
    need(vision if lines else vision.iloc[:0], (), "vision horizon", NO_VISION)
    return HorizonInfo(tuple(lines), threshold, samples_note(vision))


def vision_horizon(source: Profile | HorizonInfo, threshold: float = 0.01) -> Figure:
    """A line per kind of row: vision's share of the attention by depth, on a log scale.

    Where a line stays below the threshold begins its horizon, a diamond on the threshold with its
    95% interval.
    """
    info = source if isinstance(source, HorizonInfo) else _of_profile(source, threshold)
    with theme():
        known = any(np.isfinite(line.low).any() for line in info.lines)
        note = joined(info.note, "bands and bars: 95% intervals" if known else "")
        figure = new_figure("How deep into the model vision is looked at", note, (12.0, 5.6))
        ax = figure.subplots()
        for number, (line, (colour, marker)) in enumerate(zip(info.lines, LOOKS, strict=False)):
            _draw(line, colour, marker, ax)
            width = nested(len(ROWS) - 1 - number, len(ROWS), 3.0, 24.0)
            _mark(line, colour, width, info.threshold, ax)
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter(NullFormatter())
        layers = info.lines[0].layers
        ax.axhline(info.threshold, color=SOFT, linewidth=1.4, linestyle=(0, (4, 3)))
        layer_axis(ax, layers)
        least = info.threshold / BELOW
        ax.set_ylim(least, 1.3)  # markers at 100% stay whole
        ax.axhspan(least, info.threshold, color="black", alpha=0.05, linewidth=0)
        ax.text(
            0.006,
            info.threshold * 0.93,
            f"below {100 * info.threshold:.3g}%",
            color=SOFT,
            fontsize=12,
            va="top",
            transform=ax.get_yaxis_transform(),
        )
        percent_axis(ax, "y", full=False)
        ax.set_ylabel("Attention on vision (log scale)")
        figure.legend(loc="outside right center", labelspacing=1.1)
        return figure


def _draw(line: HorizonLine, colour: str, marker: str, ax: Axes) -> None:
    dots = {"marker": marker} if len(line.layers) <= MARKED_LAYERS else {}
    label = f"{line.title}\nhorizon: {line.horizon.words}".replace(" (95%", "\n(95%")
    plain_line(ax, line.layers, np.maximum(line.share, 1e-12), colour, label=label, zorder=3, **dots)
    interval_band(ax, line.layers, np.maximum(line.low, 1e-12), line.high, colour)


def _mark(line: HorizonLine, colour: str, width: float, threshold: float, ax: Axes) -> None:
    """The horizon on the threshold; what is drawn first is larger, so that all of equal ones are seen."""
    mark = line.horizon
    if mark.layer is None:
        return
    if mark.low is not None:
        end = len(line.layers) if mark.high is None else mark.high
        ax.plot([mark.low, end], [threshold] * 2, color=colour, linewidth=width, alpha=0.6, zorder=4)
    ax.plot(
        [mark.layer], [threshold], "D", color=colour, markersize=6 + width / 1.6, mec=INK, mew=1.2, zorder=5
    )


def _of_profile(profile: Profile, threshold: float) -> HorizonInfo:
    samples, rows = profile.frames["samples"], profile.frames["by_sample"]
    seeing = rows[rows["sample"].isin(samples.loc[samples["vision"] > 0, "sample"])]
    vision = over_samples(seeing, ["layer", "query"], "mass_vision")
    return horizon_info(vision, profile.horizon(threshold), threshold)
