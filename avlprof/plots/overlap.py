"""Do layers look at the same vision tokens? (PPCI)"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from avlprof.plots.frames import NO_VISION, Array, HalfWidths, half_widths, joined, need, samples_note
from avlprof.plots.matrix import Scale, draw_matrix, draw_scale
from avlprof.plots.style import SOFT, new_figure, theme

if TYPE_CHECKING:
    from avlprof.analysis.profile import Profile

TITLES = {"last": "Last prompt token", "step": "One decoding step"}


@dataclass(frozen=True)
class OverlapPanel:
    """`overlap [layers, layers]` in [0, 1] for one kind of query row; NaN where not measured.

    `apart` is its mean off the diagonal (NaN for a single layer), `halves` how wide the 95%
    intervals are there.
    """

    title: str
    layers: tuple[int, ...]
    overlap: Array
    apart: float
    halves: HalfWidths

    @property
    def heading(self) -> str:
        """Title and mean."""
        return self.title if np.isnan(self.apart) else f"{self.title} (mean {self.apart:.0%})"


@dataclass(frozen=True)
class OverlapInfo:
    """What `layer_overlap` draws; `most` is the largest value off the diagonals (NaN: there is none)."""

    panels: tuple[OverlapPanel, ...]
    most: float
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
    panels, most = [], float("nan")
    for query, title in TITLES.items():
        part = frame[frame["query"] == query]
        if part.empty:
            continue
        wide = part.pivot_table(index="layer_a", columns="layer_b", values="mean")
        matrix = wide.reindex(index=layers, columns=layers).to_numpy(dtype=float)
        others = matrix[~np.eye(len(layers), dtype=bool)]
        known = others[np.isfinite(others)]
        apart = float(known.mean()) if known.size else float("nan")
        halves = half_widths(part[part["layer_a"] != part["layer_b"]])
        panels.append(OverlapPanel(title, tuple(layers), matrix, apart, halves))
        most = float(np.nanmax([most, *known])) if known.size else most
    return OverlapInfo(tuple(panels), most, samples_note(frame))


def layer_overlap(source: Profile | OverlapInfo, top_share: float | None = None) -> Figure:
    """Heatmaps: the share of one layer's top vision tokens that are another layer's too.

    The diagonal is 100% by definition and left out (hatched), so that colours tell the others apart.

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
        size = (1.9 + 4.9 * len(source.panels), 6.4)
        title = "Do layers look at the same vision tokens?"
        figure = new_figure(
            title, joined(source.note, chance, "hatched: a layer with itself"), size, square=True
        )
        axes = list(figure.subplots(1, len(source.panels), squeeze=False, sharey=True)[0])
        top = 1.0 if np.isnan(source.most) else min(math.ceil(source.most * 10 + 1e-9) / 10, 1.0) or 0.1
        scale = Scale(top)
        drawn = [_draw(panel, ax, scale) for panel, ax in zip(source.panels, axes, strict=True)]
        axes[0].set_ylabel("Layer (0 = first)")
        label = "PPCI of top vision tokens" if top_share is None else f"PPCI of top {top_share:.0%} sets"
        draw_scale(figure, drawn[0], axes, scale, label)
        return figure


def _draw(panel: OverlapPanel, ax: Axes, scale: Scale) -> Any:
    others = np.where(np.eye(len(panel.layers), dtype=bool), np.nan, panel.overlap)
    drawn = draw_matrix(ax, others, panel.layers, panel.layers, scale)
    ax.set_aspect("equal")
    ax.set(xlabel="Layer (0 = first)", ylabel="")
    ax.set_title(panel.heading, pad=26 if panel.halves.words() else None)
    ax.annotate(
        panel.halves.words(), (0.0, 1.0), xytext=(0, 8), xycoords="axes fraction",
        textcoords="offset points", fontsize=11.5, color=SOFT, in_layout=False,
    )  # fmt: skip
    return drawn
