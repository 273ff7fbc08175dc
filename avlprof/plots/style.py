"""The look of every figure: seaborn's theme in our palette, and one way to tell layers apart.

Nothing here changes matplotlib for the rest of a program: the theme holds inside its context,
and figures are made without pyplot, so none is left open and none is ever shown. Seaborn takes a
second or two to import, so functions that draw import it, and those that compute do not.
Intervals are those of the data, over samples; seaborn is never asked for its own.
"""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.rcsetup import cycler
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

Array = NDArray[np.float64]

INK, SOFT, GRID = "#222222", "#6B6B6B", "#E4E4E4"
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Colour-blind-safe palette. Source: Okabe and Ito, Color Universal Design, 2008."""
TUNED, RIVALS = OKABE_ITO[1], tuple(OKABE_ITO[i] for i in (0, 2, 3, 4, 5, 7))
"""The colour of tuned policies in every figure, and those of the policies beside them."""

MODALITY_COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "system": "#999999",
        "vision": "#0072B2",
        "text": "#E69F00",
        "generated": "#009E73",
        "learned_sink": "#CC79A7",
    }
)
SUBTITLE = 12.5
NOTE = 11.0
WIDEST = 14.4
"""Inches that a figure is wide at most, however deep the model: its text of 12.5 points is then one of 6
where a paper prints it across two columns (7 inches)."""
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
LEGEND_LAYERS = 8
"""With more layers than this a colour bar takes the place of the legend, and bands are left out."""

THEME: Mapping[str, Any] = MappingProxyType(
    {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 14,
        "axes.titlesize": 14,
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.labelsize": 14,
        "axes.labelcolor": INK,
        "axes.edgecolor": SOFT,
        "axes.linewidth": 1.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=OKABE_ITO),
        "grid.color": GRID,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.labelsize": 12.5,
        "ytick.labelsize": 12.5,
        "text.color": INK,
        "text.parse_math": False,
        "lines.linewidth": 2.2,
        "lines.markersize": 7,
        "legend.frameon": False,
        "legend.fontsize": 12.5,
        "legend.title_fontsize": 12.5,
        "figure.titlesize": 18,
        "figure.titleweight": "bold",
        "figure.constrained_layout.w_pad": 0.12,
        "figure.constrained_layout.h_pad": 0.10,
        "figure.facecolor": "white",
        "figure.dpi": 100,
        "savefig.dpi": 160,
        "savefig.facecolor": "white",
        "svg.fonttype": "none",
        "svg.hashsalt": "avlprof",
        "pdf.fonttype": 42,
    }
)
"""What differs from seaborn's `whitegrid`; names of users may hold a dollar, so no text is mathematics."""


class ThemedFigure(Figure):
    """A `Figure` that a notebook can display although pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with theme():
            self.savefig(buffer, format="png", dpi=self.get_dpi())
        return buffer.getvalue()


@contextlib.contextmanager
def theme() -> Iterator[None]:
    """Draw and save in the look of this project; on leaving, matplotlib's settings are as before."""
    import seaborn as sns

    settings: Any = {**sns.axes_style("whitegrid"), **sns.plotting_context("notebook"), **THEME}
    with mpl.rc_context(settings):
        yield


def new_figure(
    title: str,
    note: str = "",
    size: tuple[float, float] = (10.0, 5.6),
    square: bool = False,
    subtitle: str = "",
) -> Figure:
    """An empty figure: title and `subtitle` at the top left, a small `note` at the bottom right.

    To be called inside `theme()`; `size` is in inches. All three are broken into lines that fit
    the width. `square` closes the gaps that axes of fixed aspect (pictures, matrices) would leave.
    """
    figure = ThemedFigure(figsize=size, layout="compressed" if square else "constrained")
    width, height = size
    heading, below = _lines(title, 5.4 * width), _lines(subtitle, 10.2 * width) if subtitle else []
    under = 0.12 + 0.31 * len(heading)  # inches from the top to what follows the title
    figure.suptitle("\n".join(heading), x=0.012, y=1.0 - 0.12 / height, ha="left", va="top")
    if below:
        figure.text(
            0.012, 1.0 - under / height, "\n".join(below), ha="left", va="top", fontsize=SUBTITLE, color=SOFT
        )  # fmt: skip
    used = under + 0.22 * len(below) + 0.02
    cast(ConstrainedLayoutEngine, figure.get_layout_engine()).set(rect=(0.0, 0.0, 1.0, 1.0 - used / height))
    if note:
        points = NOTE * max(width / (NOTE / 6.0 * 7.0), 1.0)  # printed at 7 inches, 6 points at least
        text = "\n".join(_lines(note, 11.6 * width * NOTE / points))
        figure.supxlabel(text, x=0.988, ha="right", fontsize=points, color=SOFT)
    return figure


def _lines(text: str, width: float) -> list[str]:
    """A text in lines of at most `width` characters; line ends that it has stay."""
    return [part for line in text.split("\n") for part in textwrap.wrap(line, int(width)) or [""]]


def plain_line(axes: Axes, where: Sequence[float] | Array, values: Array, colour: Any, **look: Any) -> None:
    """One line through its points as they are; a gap in the `values` (NaN) stays a gap."""
    import seaborn as sns

    before, points = len(axes.lines), np.asarray(where, dtype=float)
    sns.lineplot(
        x=points, y=values, color=colour, estimator=None, errorbar=None,
        sort=False, legend=False, ax=axes, **look,
    )  # fmt: skip
    for drawn in axes.lines[before:]:  # seaborn leaves gaps out and so bridges them
        drawn.set_data(points, values)
    axes.set(xlabel="", ylabel="")


def layer_lines(
    axes: Axes, layers: Sequence[int], where: Sequence[float] | Array, values: Array, **look: Any
) -> None:
    """A line a layer, coloured by depth: `values [layers, points]` over `where [points]`; gaps stay gaps."""
    import seaborn as sns

    before = len(axes.lines)
    points = len(where)
    table = {"x": np.tile(where, len(layers)), "y": values.ravel(), "layer": np.repeat(layers, points)}
    sns.lineplot(
        table, x="x", y="y", hue="layer", palette=dict(zip(layers, layer_colours(layers), strict=True)),
        estimator=None, errorbar=None, legend=False, ax=axes, **look,
    )  # fmt: skip
    drawn = np.isfinite(values).any(axis=1)
    for line, row in zip(axes.lines[before:], values[drawn], strict=True):
        line.set_data(where, row)
    axes.set(xlabel="", ylabel="")


def layer_map() -> Colormap:
    """The sequential map of layers, shallow dark to deep light; its palest end is cut off."""
    base = mpl.colormaps["viridis"]
    return LinearSegmentedColormap.from_list("layers", [base(0.9 * i / 31) for i in range(32)])


def layer_colours(layers: Sequence[int]) -> list[tuple[float, float, float, float]]:
    """One colour a layer, by depth."""
    scale = _layer_scale(layers)
    return [layer_map()(float(scale(layer))) for layer in layers]


def layer_key(figure: Figure, axes: Axes | list[Axes], layers: Sequence[int]) -> None:
    """Say which colour is which layer: a legend for few layers, a colour bar for many."""
    holders = axes if isinstance(axes, list) else [axes]
    if len(layers) > LEGEND_LAYERS:
        colours = ScalarMappable(norm=_layer_scale(layers), cmap=layer_map())
        bar = figure.colorbar(colours, ax=holders, pad=0.02, aspect=28)
        bar.set_label("Layer (0 = first)")
        bar.ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        bar.outline.set_visible(False)
        return
    lines = [Line2D([], [], color=colour) for colour in layer_colours(layers)]
    names = [f"Layer {layer}" for layer in layers]
    figure.legend(lines[::-1], names[::-1], loc="outside right center")


def percent_axis(axes: Axes, which: str, full: bool = True) -> None:
    """Show shares of `axes` along `which` (`x`, `y`) as percent, from 0 to 100 when `full`."""
    for name in which:
        axis = axes.xaxis if name == "x" else axes.yaxis
        axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
        if full:
            (axes.set_xlim if name == "x" else axes.set_ylim)(0.0, 1.0)


def layer_axis(axes: Axes, layers: Sequence[int], label: bool = True) -> None:
    """A horizontal axis of layers, one unit each, ticked at whole numbers and never crowded."""
    axes.set_xlim(min(layers) - 0.6, max(layers) + 0.6)
    if len(layers) <= 16:
        axes.set_xticks(list(layers))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.grid(False, axis="x")
    if label:
        axes.set_xlabel("Layer (0 = first)")


def log2_axis(axes: Axes, ticks: Sequence[float]) -> None:
    """A base-2 logarithmic horizontal axis that is labelled in plain numbers."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())


def interval_band(axes: Axes, where: Sequence[float] | Array, low: Array, high: Array, colour: Any) -> None:
    """Shade the 95% interval around a line; where it is not known (one sample) nothing is drawn."""
    known = np.isfinite(low) & np.isfinite(high)
    if known.any():
        axes.fill_between(where, low, high, where=known.tolist(), color=colour, alpha=0.16, linewidth=0)


def nested(rank: int, count: int, least: float, most: float) -> float:
    """Size in points of what stands at `rank` of `count` (0: in front): what is behind is larger.

    So points and intervals of policies that cost the same lie over each other at their true place
    on an axis of bytes, and each can still be seen.
    """
    return least + (most - least) * rank / max(count - 1, 5)


def interval_bars(axes: Axes, where: Sequence[float] | Array, low: Array, high: Array, **look: Any) -> None:
    """Upright 95% intervals at `where`; those that are not known are left out.

    `look` goes to `vlines`, such as `color` and `linewidth`.
    """
    known = np.isfinite(low) & np.isfinite(high)
    if known.any():
        axes.vlines(np.asarray(where, dtype=float)[known], low[known], high[known], **look)


def named_bars(
    axes: Axes, names: Sequence[str], values: Array, low: Array, high: Array, colours: Sequence[str]
) -> None:
    """Level bars from the top down, one a name, each with its 95% interval where that is known."""
    import seaborn as sns

    sns.barplot(
        x=values, y=list(names), hue=list(names), palette=dict(zip(names, colours, strict=True)),
        orient="h", errorbar=None, width=0.62, saturation=1.0, linewidth=0, legend=False, ax=axes,
    )  # fmt: skip
    known = np.isfinite(low) & np.isfinite(high)
    axes.hlines(np.flatnonzero(known), low[known], high[known], color=INK, linewidth=2.0)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def share_log_axis(axes: Axes, least: float) -> None:
    """A horizontal axis of shares on a log scale, from `least` to all, ticked in plain percent."""
    axes.set_xscale("log")
    axes.set_xlim(least, 1.0)
    decades = range(math.ceil(math.log10(least) - 1e-9), 1)
    ticks = [10.0**power for power in decades]
    axes.set_xticks(ticks if len(ticks) > 2 else [t for t in (*ticks, 0.03, 0.3) if t >= least])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
    axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())


def _layer_scale(layers: Sequence[int]) -> Normalize:
    return Normalize(min(layers), max(max(layers), min(layers) + 1))
