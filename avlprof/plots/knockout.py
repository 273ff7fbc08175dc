"""What closed routes cost, layer by layer and head by head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from avlprof.plots.frames import Array, HalfWidths, half_widths, joined, need
from avlprof.plots.matrix import ANNOTATED, tick_step
from avlprof.plots.style import INK, new_figure, theme

ALL = -1
LEAST = 1e-3
"""Below so much KL (nat a token) a cell is as pale as can be."""
NDArrayBool = np.ndarray[Any, np.dtype[np.bool_]]
_FRAME = ("route", "layer", "head", "samples", "kl", "kl_low", "kl_high")


@dataclass(frozen=True)
class DamageMap:
    """One measure by rows and columns, `values`, `low` and `high [rows, columns]`; NaN is not measured.

    `signed` is one that is better above 0: a change of a metric.
    """

    title: str
    values: Array
    low: Array
    high: Array
    signed: bool = False

    @property
    def sure(self) -> NDArrayBool:
        """Which changes have an interval without 0."""
        found: NDArrayBool = (self.low > 0.0) | (self.high < 0.0)
        return found

    @property
    def halves(self) -> HalfWidths:
        """How wide the intervals of single layers are."""
        low, high = (ends[:, :-1].ravel() for ends in (self.low, self.high))
        return half_widths(pd.DataFrame({"low": low, "high": high}))


@dataclass(frozen=True)
class KnockoutInfo:
    """What `knockout_map` draws: maps of routes (rows) by layers, every layer at once in the last column."""

    routes: tuple[str, ...]
    layers: tuple[int, ...]
    maps: tuple[DamageMap, ...]
    samples: int
    closed: str


def spoken(route: str) -> str:
    """A route as figures write it."""
    return route.replace("-to-", " to ")


def knockout_info(summary: pd.DataFrame, metric: str = "") -> KnockoutInfo:
    """Maps of `Knockout.summary()`: KL, and the change of the `metric` where answers were judged.

    Raises:
        UserError: a column is missing, or no whole layer was closed.
    """
    frame = need(summary, (*_FRAME, "first", "last"), "knockout")
    whole = need(frame[frame["head"] == ALL], (), "knockout", "no whole layer was closed")
    routes = tuple(dict.fromkeys(whole["route"]))
    layers = tuple(sorted({int(layer) for layer in whole["layer"] if layer != ALL}))

    def map_of(title: str, names: tuple[str, str, str], signed: bool = False) -> DamageMap:
        values, low, high = (
            whole.pivot(index="route", columns="layer", values=name)
            .loc[list(routes), [*layers, ALL]]
            .to_numpy(float)
            for name in names
        )
        return DamageMap(title, values, low, high, signed)

    maps = [map_of("KL to the full model (nat per token)", ("kl", "kl_low", "kl_high"))]
    if "difference" in whole.columns and whole["difference"].notna().any():
        title = f"Change of {metric or 'the metric'}"
        maps.append(map_of(title, ("difference", "difference_low", "difference_high"), signed=True))
    return KnockoutInfo(routes, layers, tuple(maps), int(whole["samples"].max()), _closed(whole))


def _closed(whole: pd.DataFrame) -> str:
    """How many layers are closed at a time, in words."""
    own = whole[whole["layer"] != ALL]
    count = int((own["last"] - own["first"]).max()) + 1
    if (own["last"] == whole["last"].max()).all() and count > 1:
        return "closed: a layer and all behind it"
    return "" if count == 1 else f"closed: {count} layers around each"


def knockout_map(source: pd.DataFrame | KnockoutInfo, metric: str = "") -> Figure:
    """Routes by layers: how far the answer's tokens move, and what the metric loses.

    In maps of up to 12 layers each cell holds its number with the interval; in larger ones a dot marks a
    change whose interval excludes 0.
    """
    info = source if isinstance(source, KnockoutInfo) else knockout_info(source, metric)
    few = len(info.layers) <= ANNOTATED
    with theme():
        tall = (0.78 if few else 0.5) * len(info.routes) + 1.25
        wide = max(1.05 * len(info.layers) + 3.8, 9.0) if few else 12.0
        marked = "a dot: the 95% interval excludes 0" if not few and len(info.maps) > 1 else ""
        note = joined(f"{info.samples} samples", "95% intervals below" if few else marked, info.closed)
        size = (wide, tall * len(info.maps) + 1.3)
        figure = new_figure("What is lost when a route is closed", note, size)
        axes = figure.subplots(len(info.maps), 1, squeeze=False)[:, 0]
        for one, ax in zip(info.maps, axes, strict=True):
            _draw_routes(figure, ax, one, info, few)
            ax.set_ylabel("Route")
        axes[-1].set_xlabel("Layer (0 = first)")
        return figure


def _draw_routes(figure: Figure, ax: Axes, one: DamageMap, info: KnockoutInfo, few: bool) -> None:
    count = len(info.layers)
    gap = 0.35 if few else 0.04 * count
    edges = np.concatenate(
        [np.arange(count + 1.0), [count + gap, count + gap + (1 if few else 0.06 * count)]]
    )
    values = np.insert(one.values, count, np.nan, axis=1)
    drawn = _cells(ax, values, edges, np.arange(len(info.routes) + 1.0), one)
    centres = [*(edges[:count] + 0.5), (edges[-2] + edges[-1]) / 2]
    if few:
        _write(ax, one, centres)
    elif one.signed:
        rows, columns = np.nonzero(one.sure)
        ax.plot(np.array(centres)[columns], rows + 0.5, "o", color="white", mec=INK, ms=5, lw=0)
    step = tick_step(count)
    ticks = [i for i in range(0, count, step)]
    ax.set_xticks([centres[i] for i in ticks] + centres[-1:], [str(info.layers[i]) for i in ticks] + ["all"])
    ax.set_yticks(np.arange(len(info.routes)) + 0.5, [spoken(route) for route in info.routes])
    says = "" if few else one.halves.words("" if one.signed else "nat", 1.0)
    ax.set_title(joined(one.title, says, by="; "))
    _bar(figure, ax, drawn, one)


def _cells(ax: Axes, values: Array, x: Array, y: Array, one: DamageMap) -> Any:
    norm, colours = _colours(one)
    shown = np.ma.masked_invalid(values if one.signed else np.maximum(values, LEAST))
    drawn = ax.pcolormesh(
        x,
        y,
        shown,
        norm=norm,
        cmap=colours,
        edgecolors="white",
        linewidth=1.0 if values.shape[1] < 20 else 0.3,
    )
    ax.set_ylim(y[-1], y[0])
    ax.grid(False)
    ax.tick_params(length=0)
    for side in ax.spines.values():
        side.set_visible(False)
    return drawn


def _colours(one: DamageMap) -> tuple[Normalize, Colormap]:
    finite = one.values[np.isfinite(one.values)]
    if one.signed:
        most = max(float(np.abs(finite).max(initial=0.0)), 0.05)
        return TwoSlopeNorm(0.0, -most, most), colormaps["RdBu"]
    import seaborn as sns

    sequence = sns.color_palette("blend:#F1F8F4,#A9DFBF,#49A5AC,#3A5F9A,#2B2140", as_cmap=True)
    return LogNorm(LEAST, max(float(finite.max(initial=0.0)), 10 * LEAST)), sequence


def _write(
    ax: Axes, one: DamageMap, centres: Sequence[float] | Array, scale: DamageMap | None = None
) -> None:
    """The number of each cell in the colours of `scale`, its own interval below it unless there is one."""
    norm, colours = _colours(scale or one)
    for (row, column), value in zip(np.ndindex(one.values.shape), one.values.ravel().tolist(), strict=True):
        where = float(centres[column])
        if not math.isfinite(value):
            continue
        red, green, blue, _ = colours(float(norm(value if one.signed else max(value, LEAST))))
        ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else INK
        form = _signed if one.signed else _small
        ends = () if scale else (float(one.low[row, column]), float(one.high[row, column]))
        weight: Any = "bold" if one.signed and one.sure[row, column] else "normal"
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": ink}
        ax.text(where, row + (0.36 if ends else 0.5), form(value), fontsize=12.5, fontweight=weight, **style)
        if ends:  # one word for both where they are less than a cell shows
            ax.text(where, row + 0.70, " to ".join(dict.fromkeys(map(form, ends))), fontsize=8.5, **style)


def _small(value: float) -> str:
    """`0`, `<.001`, `.034`, `1.20`: short enough for a cell."""
    if value == 0.0:
        return "0"
    if value < 0.0005:
        return "<.001"
    return f"{value:.3f}"[1:] if value < 0.9995 else f"{value:.2f}"


def _signed(value: float) -> str:
    text = f"{value:+.2f}"
    return "0" if float(text) == 0.0 else text.replace("0.", ".")


def _bar(figure: Figure, ax: Axes | list[Axes], drawn: Any, one: DamageMap) -> None:
    bar = figure.colorbar(drawn, ax=ax, pad=0.02, aspect=28 if isinstance(ax, list) else 13)
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    if not one.signed:
        bar.ax.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"≤{value:g}" if value <= LEAST else f"{value:g}")
        )


def knockout_heads(summary: pd.DataFrame) -> Figure:
    """Layers by query heads, a map a route: KL when the route is closed for one head.

    Raises:
        UserError: a column is missing, or no single head was closed.
    """
    frame = need(summary, _FRAME, "knockout by head")
    single = frame[frame["head"] != ALL]
    need(single, (), "knockout by head", "no single head was closed; ask for heads")
    routes = tuple(dict.fromkeys(single["route"]))
    tables = [
        single[single["route"] == route].pivot(index="layer", columns="head", values="kl") for route in routes
    ]
    layers, heads = tables[0].index, tables[0].columns
    halves = half_widths(single.rename(columns={"kl_low": "low", "kl_high": "high"}))
    few = max(len(layers), len(heads)) <= ANNOTATED
    columns = min(len(routes), 3 if few else 2)
    bands = math.ceil(len(routes) / columns)
    with theme():
        wide = min(max(0.62 * len(heads), 3.4), 6.4)
        tall = min(max(0.5 * len(layers), 2.6), 5.6) + 0.7
        note = joined(f"{int(single['samples'].max())} samples", halves.words("nat", 1.0))
        size = (columns * wide + 1.9, bands * tall + 1.3)
        figure = new_figure("What is lost when a route is closed for one head", note, size)
        axes = figure.subplots(bands, columns, squeeze=False, sharex=True, sharey=True)
        values = np.stack([table.to_numpy(float) for table in tables])
        whole = DamageMap("", values, values, values)  # one scale for all, to compare the maps
        x, y = np.arange(len(heads) + 1.0), np.arange(len(layers) + 1.0)
        for ax in axes.flat[len(routes) :]:
            ax.set_axis_off()
        for route, table, ax in zip(routes, values, axes.flat, strict=False):
            drawn = _cells(ax, table, x, y, whole)
            if few:
                _write(ax, replace(whole, values=table), x[:-1] + 0.5, scale=whole)
            ax.set_title(spoken(route).capitalize())
            ax.set_xlabel("Query head")
            ax.tick_params(labelbottom=True)
        across, down = tick_step(len(heads)), tick_step(len(layers))
        axes[0][0].set_xticks(x[:-1:across] + 0.5, [str(head) for head in heads[::across]])
        axes[0][0].set_yticks(y[:-1:down] + 0.5, [str(layer) for layer in layers[::down]])
        for ax in axes[:, 0]:
            ax.set_ylabel("Layer (0 = first)")
        _bar(figure, list(axes.flat), drawn, whole)
        return figure
