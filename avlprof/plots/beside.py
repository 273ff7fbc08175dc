"""Which layers it hurts to close a route in, beside the attention that goes along it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from avlprof.plots.frames import Array, joined, need
from avlprof.plots.knockout import ALL, LEAST, spoken
from avlprof.plots.style import (
    INK,
    MODALITY_COLOURS,
    SOFT,
    interval_bars,
    layer_axis,
    new_figure,
    percent_axis,
    plain_line,
    theme,
)


@dataclass(frozen=True)
class BesidePanel:
    """A route's damage and attention by layer: means and 95% intervals `[3, layers]` (mean, low, high)."""

    route: str
    attention: str
    damage: Array
    mass: Array
    correlation: tuple[float, float, float]


@dataclass(frozen=True)
class BesideInfo:
    """What `damage_beside_attention` draws: a column a route."""

    layers: tuple[int, ...]
    panels: tuple[BesidePanel, ...]
    samples: int


def beside_info(summary: pd.DataFrame, beside: pd.DataFrame, mass: pd.DataFrame) -> BesideInfo:
    """Damage of `Knockout.summary()` beside the attention of the same layers.

    Args:
        beside: `Knockout.beside(profile)`.
        mass: `route, layer, mean, low, high`: the share of attention of each route.

    Raises:
        UserError: no route of both is there.
    """
    need(beside, ("route", "attention", "rank_correlation", "low", "high"), "damage beside attention")
    panels = []
    layers: tuple[int, ...] = ()
    for row in beside.to_dict("records"):
        own = summary[
            (summary["route"] == row["route"]) & (summary["head"] == ALL) & (summary["layer"] != ALL)
        ].sort_values("layer")
        layers = tuple(int(layer) for layer in own["layer"])
        seen = mass[mass["route"] == row["route"]].set_index("layer").loc[list(layers)]
        panels.append(
            BesidePanel(
                str(row["route"]),
                str(row["attention"]),
                own[["kl", "kl_low", "kl_high"]].to_numpy(float).T,
                seen[["mean", "low", "high"]].to_numpy(float).T,
                (float(row["rank_correlation"]), float(row["low"]), float(row["high"])),
            )
        )
    return BesideInfo(layers, tuple(panels), int(summary["samples"].max()))


def damage_beside_attention(
    source: pd.DataFrame | BesideInfo,
    beside: pd.DataFrame | None = None,
    mass: pd.DataFrame | None = None,
) -> Figure:
    """A column a route: damage of closing it (logarithmic) above the attention that goes along it."""
    if not isinstance(source, BesideInfo):
        assert beside is not None and mass is not None
        source = beside_info(source, beside, mass)
    info = source
    with theme():
        width = max(4.3 * len(info.panels) + 0.8, 7.5)
        note = joined(f"{info.samples} samples", "bars: 95% intervals")
        figure = new_figure("Where it hurts, and where it looks", note, (width, 6.4))
        axes = figure.subplots(2, len(info.panels), sharex=True, sharey="row", squeeze=False)
        for panel, (above, below) in zip(info.panels, axes.T, strict=True):
            _draw_beside(panel, info.layers, above, below)
        axes[0][0].set_ylabel("KL when closed\n(nat per token)")
        axes[1][0].set_ylabel("Share of attention")
        return figure


def _draw_beside(panel: BesidePanel, layers: Sequence[int], above: Axes, below: Axes) -> None:
    damage = np.maximum(panel.damage, LEAST / 10)
    plain_line(above, layers, damage[0], INK, marker="o")
    interval_bars(above, layers, damage[1], damage[2], color=INK, linewidth=1.6)
    above.set_yscale("log")
    above.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"≤{value:g}" if value <= LEAST / 10 else f"{value:g}")
    )
    rho, low, high = panel.correlation
    interval = f" [{low:+.2f}, {high:+.2f}]" if math.isfinite(low) else ""
    above.set_title(f"rank correlation {rho:+.2f}{interval}", loc="left", fontsize=12, color=SOFT, pad=6)
    above.annotate(
        spoken(panel.route).capitalize(),
        (0.0, 1.0), xytext=(0, 26), xycoords="axes fraction", textcoords="offset points", fontsize=14,
        annotation_clip=False,
    )  # fmt: skip
    target = panel.route.split("-to-")[1]
    colour = MODALITY_COLOURS.get({"question": "text"}.get(target, target), INK)
    plain_line(below, layers, panel.mass[0], colour, marker="o")
    interval_bars(below, layers, panel.mass[1], panel.mass[2], color=colour, linewidth=1.6)
    below.set_title(panel.attention, fontsize=12, color=SOFT)
    layer_axis(below, layers)
    layer_axis(above, layers, label=False)
    percent_axis(below, "y", full=False)
    below.set_ylim(bottom=0.0)
