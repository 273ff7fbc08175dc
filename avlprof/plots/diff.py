"""What differs between two runs, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from avlprof.plots.frames import Array, count_range, joined, need, whole_layers
from avlprof.plots.style import INK, OKABE_ITO, SOFT, interval_bars, layer_axis, new_figure, theme

if TYPE_CHECKING:
    from avlprof.analysis.profile import Profile

LAST, STEP = "last", "generated"
PANELS = (
    ("mass_vision", LAST, "Attention on vision\nlast prompt token", "points", 100.0),
    ("mass_vision", STEP, "Attention on vision\nwhile decoding", "points", 100.0),
    ("coverage_90", "", "Vision tokens that hold 90%\nof a head's vision attention", "points", 100.0),
    ("overlap_8", STEP, "Overlap of top vision tokens\nwith those 8 steps before", "points", 100.0),
    ("window_95", "", "Text window that holds 95%\nof text attention", "tokens", 1.0),
    ("entropy", "", "Entropy of a row", "nat", 1.0),
)
"""Statistic of `Profile.by_sample`, query (none: generated rows, else the last), title, unit, factor."""
COLUMNS = 3
LONGEST = 28
FLOORS = {"points": 1.0, "tokens": 1.0, "nat": 0.05}
"""Half the smallest range of an axis, so that nothing does not look like something."""


@dataclass(frozen=True)
class DiffPanel:
    """One statistic: `change [layers]` in `unit` with the ends of its 95% interval (NaN: not known).

    `sure [layers]` says where the interval excludes zero.
    """

    title: str
    unit: str
    layers: tuple[int, ...]
    change: Array
    low: Array
    high: Array
    sure: NDArray[np.bool_]


@dataclass(frozen=True)
class DiffInfo:
    """What `layer_diff` draws: `here` less `other`, both by name; `how` the samples were compared."""

    panels: tuple[DiffPanel, ...]
    here: str
    other: str
    how: str


def diff_info(frame: pd.DataFrame, names: tuple[str, str] = ("this run", "the other")) -> DiffInfo:
    """Differences by layer, of the statistics that both runs have.

    Args:
        frame: `Profile.diff()`: `layer, query, statistic, mean, low, high, n, n_other, how`.
        names: of this run and of the other.

    Raises:
        UserError: a column is missing, or the runs share no statistic.
    """
    columns = ("layer", "query", "statistic", "mean", "low", "high", "n", "n_other", "how")
    empty = "the runs have no statistic in common; trace both with the same settings"
    need(frame, columns, "differences", empty)
    answer = STEP if (frame["query"] == STEP).any() else LAST
    panels = []
    for statistic, query, title, unit, factor in PANELS:
        part = frame[(frame["statistic"] == statistic) & (frame["query"] == (query or answer))]
        if part.empty:
            continue
        part = part.sort_values("layer")
        change, low, high = (factor * part[name].to_numpy(dtype=float) for name in ("mean", "low", "high"))
        layers = whole_layers(pd.Index(part["layer"]))
        panels.append(DiffPanel(title, unit, layers, change, low, high, (low > 0) | (high < 0)))
    need(frame if panels else frame.iloc[:0], (), "differences", empty)
    paired = (frame["how"] == "paired").all()
    most, theirs = count_range(frame["n"]), count_range(frame["n_other"])
    how = f"{most} samples, each against itself" if paired else f"{most} samples against {theirs} others"
    return DiffInfo(tuple(panels), *names, how)


def run_names(here: Profile, other: Profile) -> tuple[str, str]:
    """Two profiles by what tells them apart: policy, task or model; else by their runs."""
    a, b = here.meta.settings, other.meta.settings
    pairs = [
        (a.policy or "dense", b.policy or "dense"),
        (a.task, b.task),
        (a.model, b.model),
        (here.meta.run, other.meta.run),
    ]
    first, second = next((pair for pair in pairs if pair[0] != pair[1]), pairs[-1])
    return _short(first), _short(second)


def layer_diff(source: Profile | DiffInfo, other: Profile | None = None) -> Figure:
    """A panel a statistic: this profile less another in each layer, with 95% intervals around zero.

    Args:
        source: a profile (then `other` is needed), or the information.
        other: the profile to compare with.
    """
    if not isinstance(source, DiffInfo):
        if other is None:
            raise TypeError("layer_diff needs the other profile")
        source = diff_info(source.diff(other), run_names(source, other))
    info = source
    cols = min(COLUMNS, len(info.panels))
    rows = math.ceil(len(info.panels) / cols)
    with theme():
        known = any(np.isfinite(panel.low).any() for panel in info.panels)
        note = joined(info.how, *(("bars: 95% interval", "filled: it excludes 0") if known else ()))
        title = f"What differs: {info.here} less {info.other}"
        figure = new_figure(title, note, (max(4.3 * cols, 8.0), 3.5 * rows + 1.1))
        axes = list(figure.subplots(rows, cols, squeeze=False).flat)
        for panel, ax in zip(info.panels, axes, strict=False):
            _draw(panel, ax)
        for ax in axes[len(info.panels) :]:
            ax.set_axis_off()
        return figure


def _draw(panel: DiffPanel, ax: Axes) -> None:
    import seaborn as sns

    ax.axhline(0.0, color=INK, linewidth=1.4)
    many = len(panel.layers) > 16
    known = np.isfinite(panel.low)
    where = np.array(panel.layers)
    for chosen, colour, face in ((panel.sure, OKABE_ITO[1], OKABE_ITO[1]), (~panel.sure, SOFT, "white")):
        bars = chosen & known
        interval_bars(ax, where[bars], panel.low[bars], panel.high[bars], color=colour,
                      linewidth=1.4 if many else 2.0)  # fmt: skip
        sns.scatterplot(
            x=where[chosen], y=panel.change[chosen], facecolor=face, edgecolor=colour, linewidth=1.6,
            s=26 if many else 64, legend=False, zorder=3, ax=ax,
        )  # fmt: skip
    ends = np.concatenate([panel.change, panel.low[known], panel.high[known]])
    most = max(float(np.abs(ends).max()) * 1.12, FLOORS[panel.unit])
    ax.set_ylim(-most, most)
    ax.set_title(panel.title, fontsize=13)
    ax.set_ylabel(f"Difference ({panel.unit})" if panel.unit != "points" else "Difference (% points)")
    layer_axis(ax, panel.layers)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
