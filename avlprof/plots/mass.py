"""Which modality each layer attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from avlprof.plots.frames import Array, joined, need, samples_note, table, whole_layers
from avlprof.plots.style import INK, MODALITY_COLOURS, layer_axis, new_figure, percent_axis, theme

if TYPE_CHECKING:
    from avlprof.analysis.profile import Profile

PANELS = (
    ("prefill", "last", "Prefill: last prompt token"),
    ("decode", "generated", "Decode: generated tokens"),
)
STACK = ("vision", "text", "generated", "system", "learned_sink")
"""Vision stands on the axis, so that its share and interval can be read off."""
LABELLED_LAYERS = 12


@dataclass(frozen=True)
class Horizon:
    """A layer beyond which vision carries no mass, with its interval; None: no such layer."""

    layer: int | None
    low: int | None
    high: int | None

    @property
    def words(self) -> str:
        """`layer 20 (95%: 18 to 22)`."""
        if self.layer is None:
            return "none"
        ends = [("none" if end is None else str(end)) for end in (self.low, self.high)]
        if self.low is None or ends[0] == ends[1]:
            return f"layer {self.layer}"
        return f"layer {self.layer} (95%: {ends[0]} to {ends[1]})"


@dataclass(frozen=True)
class MassPanel:
    """Attention of one kind of query row: `share [layers, modalities]`, rows sum to 1.

    `low` and `high [layers]` bound the 95% interval of the share of vision (NaN: not known);
    `horizon` is that of these rows, None if it was not asked for.
    """

    title: str
    layers: tuple[int, ...]
    modalities: tuple[str, ...]
    share: Array
    low: Array
    high: Array
    horizon: Horizon | None = None


@dataclass(frozen=True)
class MassInfo:
    """What `modality_mass` draws: a panel per phase that was traced."""

    panels: tuple[MassPanel, ...]
    note: str

    @property
    def without(self) -> str:
        """Which rows were asked for a horizon and have none, in words."""
        phases = [
            panel.title.split(":")[0].lower()
            for panel in self.panels
            if panel.horizon is not None and panel.horizon.layer is None
        ]
        return f"no horizon in {' and '.join(phases)}" if phases else ""


def mass_info(frame: pd.DataFrame, horizon: pd.DataFrame | None = None) -> MassInfo:
    """Mean attention per layer and modality, for the last prompt row and the generated rows.

    Args:
        frame: `profile["mass"]`: `layer, phase, query, modality, mean, low, high` (and `n`).
        horizon: `Profile.horizon()`, to mark it.

    Raises:
        UserError: a column is missing, or neither kind of row was traced.
    """
    need(frame, ("layer", "phase", "query", "modality", "mean", "low", "high"), "modality mass")
    wanted = [(phase, query) for phase, query, _ in PANELS]
    known = pd.MultiIndex.from_frame(frame[["phase", "query"]]).isin(wanted)
    need(frame[known], (), "modality mass")
    marks = {} if horizon is None else horizons(horizon)
    panels = []
    for phase, query, title in PANELS:
        part = frame[(frame["phase"] == phase) & (frame["query"] == query)]
        if part.empty:
            continue
        wide = table(part, "layer", "modality", "mean")
        names = tuple(name for name in STACK if name in wide.columns and wide[name].any())
        share = wide[list(names)].fillna(0.0).to_numpy(dtype=float)
        vision = part[part["modality"] == "vision"].set_index("layer").reindex(wide.index)
        low, high = (vision[name].to_numpy(dtype=float) for name in ("low", "high"))
        panels.append(MassPanel(title, whole_layers(wide.index), names, share, low, high, marks.get(query)))
    return MassInfo(tuple(panels), samples_note(frame))


def horizons(frame: pd.DataFrame) -> dict[str, Horizon]:
    """Rows of `Profile.horizon()` by query."""
    marks = {}
    for row in frame.to_dict("records"):
        ends = (None if pd.isna(row[name]) else int(row[name]) for name in ("layer", "low", "high"))
        marks[str(row["query"])] = Horizon(*ends)
    return marks


def modality_mass(source: Profile | MassInfo) -> Figure:
    """Stacked bars: how each layer's attention divides over the modalities, one panel a phase.

    Whiskers are the 95% interval of vision's share; a dashed line is the horizon, with its interval.
    """
    info = source if isinstance(source, MassInfo) else mass_info(source["mass"], source.horizon())
    with theme():
        known = any(np.isfinite(panel.low).any() for panel in info.panels)
        whiskers = "whiskers: 95% interval of vision" if known else ""
        note = joined(info.note, whiskers, info.without)
        figure = new_figure("What each layer attends to", note, (12.0, 5.6))
        axes = figure.subplots(1, len(info.panels), sharey=True, squeeze=False)[0]
        for panel, ax in zip(info.panels, axes, strict=True):
            _draw(panel, ax)
        axes[0].set_ylabel("Share of attention")
        used = [name for name in STACK if any(name in panel.modalities for panel in info.panels)]
        handles = [axes[0].bar(0, 0, color=MODALITY_COLOURS[name]) for name in used]
        names = [name.capitalize().replace("_", " ") for name in used]
        figure.legend(handles[::-1], names[::-1], loc="outside right center")
        return figure


def _draw(panel: MassPanel, ax: Axes) -> None:
    few = len(panel.layers) <= LABELLED_LAYERS
    base = panel.share[:, 0] * 0.0
    for name, share in zip(panel.modalities, panel.share.T, strict=True):
        gap = 1.5 if few else 0.0
        ax.bar(
            panel.layers, share, 0.82 if few else 1.0, base, color=MODALITY_COLOURS[name], ec="white", lw=gap
        )
        if few:
            _say(panel, name, share, base, ax)
        base = base + share
    _whiskers(panel, ax)
    _mark(panel, ax)
    ax.set_title(panel.title)
    layer_axis(ax, panel.layers)
    percent_axis(ax, "y")


def _say(panel: MassPanel, name: str, share: Array, base: Array, ax: Axes) -> None:
    """The number in each part that has room for it below the whisker of vision."""
    for layer, part, start, low, high in zip(panel.layers, share, base, panel.low, panel.high, strict=True):
        end = start + part
        if name == "vision":
            end = min(end, low) if np.isfinite(low) else end
        elif np.isfinite(high):
            start = max(start, min(high, end))
        if end - start >= 0.06:
            ink = "white" if name in ("vision", "generated") else INK
            ax.text(
                layer,
                (start + end) / 2,
                f"{100 * part:.0f}",
                ha="center",
                va="center",
                color=ink,
                fontsize=12,
            )


def _whiskers(panel: MassPanel, ax: Axes) -> None:
    if "vision" not in panel.modalities:
        return
    mean = panel.share[:, panel.modalities.index("vision")]
    known = np.isfinite(panel.low)
    where, mean, low, high = (
        values[known] for values in (np.array(panel.layers), mean, panel.low, panel.high)
    )
    ends = np.clip(np.stack([mean - np.clip(low, 0.0, 1.0), np.clip(high, 0.0, 1.0) - mean]), 0.0, None)
    thin = len(panel.layers) > LABELLED_LAYERS
    for colour, width in (("white", 4.0), (INK, 1.6)):
        if not (thin and colour == "white"):
            ax.errorbar(where, mean, ends, fmt="none", ecolor=colour, elinewidth=width, capsize=0, zorder=4)


def _mark(panel: MassPanel, ax: Axes) -> None:
    """The horizon as a line before its first layer, and its interval as a shade."""
    mark = panel.horizon
    if mark is None or mark.layer is None:
        return
    last = len(panel.layers)
    edge, low = mark.layer - 0.5, (mark.layer if mark.low is None else mark.low) - 0.5
    high = (last if mark.high is None and mark.low is not None else mark.high or mark.layer) - 0.5
    ax.axvspan(low, high, color=INK, alpha=0.22, linewidth=0, zorder=5)
    ax.axvline(edge, color=INK, linewidth=2.4, linestyle=(0, (4, 2)), zorder=6)
    right = edge < 0.55 * last
    ax.annotate(
        f"horizon: {mark.words.replace(' (', chr(10) + '(')}",
        (edge, 0.5),
        xytext=(8 if right else -8, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        va="center",
        fontsize=12,
        bbox={"boxstyle": "round,pad=0.35", "fc": "white", "ec": "none", "alpha": 0.9},
        zorder=7,
    )
