"""Layers by heads: who looks at the picture, who rests on the first token, who looks where others do."""

from __future__ import annotations

import math
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
    whole_layers,
)
from avlprof.plots.matrix import Scale, draw_matrix, draw_scale
from avlprof.plots.style import SOFT, SUBTITLE, WIDEST, new_figure, theme

if TYPE_CHECKING:
    from avlprof.analysis.profile import Profile

TITLES = {
    "vision": "Attention on vision",
    "sink": "Attention on the first token",
    "entropy": "Row entropy",
    "shared": "Overlap with the layer's mean",
    "others": "Mean overlap with another head",
}
SHARES = ("vision", "sink")
SOURCES = (("decode", "generated", "generated tokens"), ("prefill", "last", "last prompt token"))
OVERLAP_ROWS = {"step": "one decoding step", "last": "last prompt token"}
OVERLAP = "overlap of heads"
LEAST_TOP = 0.1
UNKNOWN = HalfWidths(float("nan"), float("nan"))


@dataclass(frozen=True)
class HeadMap:
    """`values [layers, heads]` of one statistic: shares in [0, 1], or nat for `entropy`.

    Colours end at `top`; `halves` says how wide the 95% intervals of the cells are.
    """

    statistic: str
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    values: Array
    top: float
    halves: HalfWidths = UNKNOWN

    @property
    def share(self) -> bool:
        """Whether the values are shares."""
        return self.statistic != "entropy"

    @property
    def interval(self) -> str:
        """How wide the intervals are, in words; empty when that is not known."""
        return self.halves.words() if self.share else self.halves.words("nat", 1.0)


@dataclass(frozen=True)
class HeadInfo:
    """What `draw_head_maps` draws: maps of the same layers and heads, and which rows they are of."""

    title: str
    maps: tuple[HeadMap, ...]
    rows: str
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
        most = float(np.nanmax(values)) or 1.0
        top = min(max(math.ceil(most * 10 - 1e-9) / 10, LEAST_TOP), 1.0) if statistic in SHARES else most
        layers, heads = whole_layers(wide.index), whole_layers(wide.columns)
        maps.append(HeadMap(statistic, layers, heads, values, top, half_widths(own)))
    return HeadInfo("What single heads do", tuple(maps), rows, samples_note(part))


def head_maps(source: Profile | HeadInfo, statistics: tuple[str, ...] = SHARES) -> Figure:
    """A map of layers by heads for each statistic.

    Raises:
        UserError: the run holds averages over heads only.
    """
    return draw_head_maps(source if isinstance(source, HeadInfo) else head_info(source["heads"], statistics))


def head_overlap_info(frame: pd.DataFrame, top_share: float | None = None) -> HeadInfo:
    """Overlap of each head's top set within its layer (PPCI), of decoding steps (of the last prompt
    row if none).

    The map `shared` is the overlap with the set of the layer's head mean, `others` the mean overlap
    with the layer's other heads, of which no interval is known.

    Args:
        frame: `profile["head_overlap"]`: `layer_a, head_a, layer_b, head_b, query, mean, low, high`
            (and `n`).
        top_share: size of the sets as a share of the vision tokens; it is also the overlap of
            random sets.

    Raises:
        UserError: a column is missing, no traced sample has vision tokens, or the model has one head.
    """
    columns = ("layer_a", "head_a", "layer_b", "head_b", "query", "mean", "low", "high")
    need(frame, columns, OVERLAP, NO_VISION)
    query = "step" if (frame["query"] == "step").any() else "last"
    part = frame[(frame["query"] == query) & (frame["layer_a"] == frame["layer_b"])]
    chosen = {
        "shared": part["head_b"] < 0,
        "others": (part["head_b"] >= 0) & (part["head_b"] != part["head_a"]),
    }
    tables = {
        name: table(need(part[rows], (), OVERLAP, "a layer has one head"), "layer_a", "head_a", "mean")
        for name, rows in chosen.items()
    }
    layers, heads = (tuple(sorted({int(i) for i in frame[name]})) for name in ("layer_a", "head_a"))
    values = {  # of the same layers and heads, though a layer that never looks is in neither table
        name: wide.reindex(index=list(layers), columns=list(heads)).to_numpy(dtype=float)
        for name, wide in tables.items()
    }
    top = max(float(np.nanmax(one)) for one in values.values()) or 1.0  # one scale, to compare the maps
    halves = {"shared": half_widths(part[chosen["shared"]]), "others": UNKNOWN}
    maps = tuple(HeadMap(name, layers, heads, own, top, halves[name]) for name, own in values.items())
    chance = "" if top_share is None else f"sets of the best {top_share:.0%} (random ones: {top_share:.0%})"
    note = joined(samples_note(part), chance)
    title = "Do the heads of a layer look at the same vision tokens?"
    return HeadInfo(title, maps, OVERLAP_ROWS[query], note)


def head_overlap(source: Profile | HeadInfo) -> Figure:
    """Two maps of layers by heads: what a head's top vision tokens have in common with its layer's.

    Raises:
        UserError: the run holds averages over heads only.
    """
    if not isinstance(source, HeadInfo):
        source = head_overlap_info(source["head_overlap"], source.meta.settings.top_share)
    return draw_head_maps(source)


def draw_head_maps(info: HeadInfo) -> Figure:
    """Maps of layers by heads, side by side, with the width of the intervals above each."""
    with theme():
        layers, heads = len(info.maps[0].layers), len(info.maps[0].heads)
        wide = min(max(0.55 * heads, 4.8), 6.2, WIDEST / len(info.maps) - 1.2)
        tall = min(max(wide * layers / heads, 3.2), 6.2)
        size = (len(info.maps) * (wide + 1.2), tall + 2.0)
        holes = any(np.isnan(one.values).any() for one in info.maps)
        note = joined(info.rows, info.note, "hatched: nothing was measured" if holes else "")
        figure = new_figure(info.title, note, size)
        axes = figure.subplots(1, len(info.maps), squeeze=False, sharey=True)[0]
        for one, ax in zip(info.maps, axes, strict=True):
            _draw(one, ax)
        axes[0].set_ylabel("Layer (0 = first)")
        return figure


def _draw(one: HeadMap, ax: Axes) -> None:
    scale = Scale(one.top, one.share)
    drawn = draw_matrix(ax, one.values, one.layers, one.heads, scale)
    ax.set_title(TITLES[one.statistic], pad=26 if one.interval else None)
    if one.interval:
        ax.annotate(
            one.interval, (0.0, 1.0), xytext=(0, 8), xycoords="axes fraction", textcoords="offset points",
            fontsize=SUBTITLE, color=SOFT, in_layout=False,
        )  # fmt: skip
    ax.set(xlabel="Query head", ylabel="")
    draw_scale(ax.figure, drawn, ax, scale, "" if one.share else "nat")
