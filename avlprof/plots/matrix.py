"""Maps of numbers: layers by heads, layers by layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from avlprof.plots.frames import Array

MISSING = "#BDBDBD"
ANNOTATED = 12
"""Most rows or columns whose cells hold their number; larger maps have colours alone."""
LABELS = 9
"""Most tick labels a side."""
STEPS = (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100)


@dataclass(frozen=True)
class Scale:
    """What the colours of a map mean: from 0 to `top`, written as shares or as plain numbers."""

    top: float
    share: bool = True

    def cell(self, value: float) -> str:
        """A number as it stands in a cell: a share in percent, without its sign."""
        return f"{100 * value:.0f}" if self.share else f"{value:.1f}"

    def tick(self, value: float, _: Any = None) -> str:
        """A number as it stands at the colour bar."""
        return f"{100 * value:.3g}%" if self.share else f"{value:.3g}"


def draw_matrix(ax: Axes, values: Array, rows: Sequence[int], columns: Sequence[int], scale: Scale) -> Any:
    """A heatmap of `values [rows, columns]`, the first row on top: the darker, the more.

    A cell without a value is hatched, so that it is not taken for one near zero.

    Returns:
        What a colour bar is made for.
    """
    import pandas as pd
    import seaborn as sns

    few = max(values.shape) <= ANNOTATED
    sns.heatmap(
        pd.DataFrame(values, index=list(rows), columns=list(columns)),
        vmin=0.0,
        vmax=scale.top,
        cmap=sns.color_palette("blend:#F1F8F4,#A9DFBF,#49A5AC,#3A5F9A,#2B2140", as_cmap=True),
        annot=_texts(values, scale.cell) if few else False,
        fmt="",
        annot_kws={"fontsize": 12},
        linewidths=1.0 if few else 0.0,
        linecolor="white",
        xticklabels=tick_step(len(columns)),
        yticklabels=tick_step(len(rows)),
        cbar=False,
        rasterized=not few,
        ax=ax,
    )
    ax.grid(False)
    ax.patch.set(facecolor="white", edgecolor=MISSING, hatch="////", linewidth=0.0)
    ax.tick_params(length=0)
    for axis in ("x", "y"):
        ax.tick_params(axis=axis, labelrotation=0)
    return ax.collections[0]


def draw_scale(figure: Any, drawn: Any, axes: Axes | list[Axes], scale: Scale, label: str = "") -> None:
    """The colour bar of `drawn`, beside `axes`."""
    bar = figure.colorbar(drawn, ax=axes, pad=0.02, aspect=28)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(scale.tick))
    bar.set_label(label)


def tick_step(count: int) -> int:
    """Every how many-th of `count` ticks has a label, so that at most `LABELS` stand on one side."""
    fits = (step for step in STEPS if count <= LABELS * step)
    return 1 if count <= ANNOTATED else next(fits, STEPS[-1])


def _texts(values: Array, cell: Callable[[float], str]) -> Any:
    return np.vectorize(lambda value: cell(value) if np.isfinite(value) else "", otypes=[object])(values)
