"""Which modality each layer attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from avlprof.plots.frames import Array, need, samples_note, table
from avlprof.plots.style import INK, MODALITY_COLOURS, layer_axis, new_figure, percent_axis, theme

if TYPE_CHECKING:
    from avlprof.analysis.profile import Profile

PANELS = (
    ("prefill", "last", "Prefill: last prompt token"),
    ("decode", "generated", "Decode: generated tokens"),
)
LABELLED_LAYERS = 12


@dataclass(frozen=True)
class MassPanel:
    """Attention of one kind of query row: `share [layers, modalities]`, rows sum to 1."""

    title: str
    layers: tuple[int, ...]
    modalities: tuple[str, ...]
    share: Array


@dataclass(frozen=True)
class MassInfo:
    """What `modality_mass` draws: a panel per phase that was traced."""

    panels: tuple[MassPanel, ...]
    note: str


def mass_info(frame: pd.DataFrame) -> MassInfo:
    """Mean attention per layer and modality, for the last prompt row and the generated rows.

    Args:
        frame: `Profile.mass()`: `layer, phase, query, modality, mean` (and `n`).

    Raises:
        UserError: a column is missing, or neither kind of row was traced.
    """
    need(frame, ("layer", "phase", "query", "modality", "mean"), "modality mass")
    wanted = [(phase, query) for phase, query, _ in PANELS]
    known = pd.MultiIndex.from_frame(frame[["phase", "query"]]).isin(wanted)
    need(frame[known], (), "modality mass")
    panels = []
    for phase, query, title in PANELS:
        part = frame[(frame["phase"] == phase) & (frame["query"] == query)]
        if part.empty:
            continue
        wide = table(part, "layer", "modality", "mean")
        names = tuple(name for name in MODALITY_COLOURS if name in wide.columns and wide[name].any())
        share = wide[list(names)].fillna(0.0).to_numpy(dtype=float)
        panels.append(MassPanel(title, tuple(int(i) for i in wide.index), names, share))
    return MassInfo(tuple(panels), samples_note(frame))


def modality_mass(source: Profile | MassInfo) -> Figure:
    """Stacked bars: how each layer's attention divides over the modalities, one panel a phase."""
    info = source if isinstance(source, MassInfo) else mass_info(source.mass())
    with theme():
        figure = new_figure(
            "What each layer attends to", f"{info.note}, all heads".removeprefix(", "), (12.0, 5.6)
        )
        axes = figure.subplots(1, len(info.panels), sharey=True, squeeze=False)[0]
        for panel, ax in zip(info.panels, axes, strict=True):
            _draw(panel, ax)
        axes[0].set_ylabel("Share of attention")
        used = [name for name in MODALITY_COLOURS if any(name in panel.modalities for panel in info.panels)]
        handles = [axes[0].bar(0, 0, color=MODALITY_COLOURS[name]) for name in used]
        names = [name.capitalize() for name in used]
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
        for layer, part, low in zip(panel.layers, share, base, strict=True):
            if few and part >= 0.06:
                text = f"{part:.0%}".removesuffix("%")
                ax.text(
                    layer,
                    low + part / 2,
                    text,
                    ha="center",
                    va="center",
                    color=INK if name in ("text", "system") else "white",
                    fontsize=12,
                )
        base = base + share
    ax.set_title(panel.title)
    layer_axis(ax, panel.layers)
    percent_axis(ax, "y")
