"""How much attention each layer parks on first tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from avlprof.plots.frames import Array, joined, need, samples_note, table, whole_layers
from avlprof.plots.mass import PANELS
from avlprof.plots.style import (
    OKABE_ITO,
    interval_band,
    layer_axis,
    new_figure,
    percent_axis,
    plain_line,
    theme,
)

if TYPE_CHECKING:
    from avlprof.analysis.profile import Profile

KINDS = {"first": "First token\nof the prompt", "text": "First\ntext tokens"}
LOOKS = {"first": (OKABE_ITO[3], "o"), "text": (OKABE_ITO[4], "s")}
MARKED_LAYERS = 24
LEAST_TOP = 0.1
"""The axis ends no lower, so that noise around zero does not fill the figure."""


@dataclass(frozen=True)
class SinkPanel:
    """Attention on sinks of one kind of row: `share, low, high [kinds, layers]`, 95% intervals."""

    title: str
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    share: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class SinkInfo:
    """What `sink_mass` draws: a panel per phase that was traced."""

    panels: tuple[SinkPanel, ...]
    note: str


def sink_info(frame: pd.DataFrame) -> SinkInfo:
    """Attention on the first token of the prompt and on the first text tokens, by layer.

    Args:
        frame: `profile["sinks"]`: `layer, phase, query, sink, mean, low, high` (and `n`).

    Raises:
        UserError: a column is missing, or neither the last prompt row nor decoding was traced.
    """
    need(frame, ("layer", "phase", "query", "sink", "mean", "low", "high"), "sinks")
    panels = []
    for phase, query, title in PANELS:
        part = frame[(frame["phase"] == phase) & (frame["query"] == query)]
        if part.empty:
            continue
        wide = {name: table(part, "sink", "layer", name) for name in ("mean", "low", "high")}
        kinds = tuple(kind for kind in KINDS if kind in wide["mean"].index)
        share, low, high = (
            one.reindex(index=list(kinds), columns=wide["mean"].columns).to_numpy(dtype=float)
            for one in wide.values()
        )
        panels.append(SinkPanel(title, whole_layers(wide["mean"].columns), kinds, share, low, high))
    need(frame if panels else frame.iloc[:0], (), "sinks")
    return SinkInfo(tuple(panels), samples_note(frame))


def sink_mass(source: Profile | SinkInfo, text_sink: int | None = None) -> Figure:
    """A line per kind of sink over the layers, one panel a phase.

    Args:
        source: a profile, or the information.
        text_sink: how many first text tokens count as sinks, for the label (a profile knows it).
    """
    if not isinstance(source, SinkInfo):
        text_sink = source.meta.settings.text_sink
        source = sink_info(source["sinks"])
    names = KINDS if text_sink is None else KINDS | {"text": f"First {text_sink}\ntext tokens"}
    with theme():
        known = any(np.isfinite(panel.low).any() for panel in source.panels)
        note = joined(source.note, "bands: 95% interval" if known else "")
        figure = new_figure("How much attention rests on first tokens", note, (12.0, 5.2))
        axes = figure.subplots(1, len(source.panels), sharey=True, squeeze=False)[0]
        top = LEAST_TOP
        for panel, ax in zip(source.panels, axes, strict=True):
            for kind, share, low, high in zip(panel.kinds, panel.share, panel.low, panel.high, strict=True):
                colour, marker = LOOKS[kind]
                dots = {"marker": marker} if len(panel.layers) <= MARKED_LAYERS else {}
                plain_line(ax, panel.layers, share, colour, label=names[kind], **dots)
                interval_band(ax, panel.layers, low, high, colour)
                top = max(top, float(pd.Series([*share, *high]).max()))
            ax.set_title(panel.title)
            layer_axis(ax, panel.layers)
            percent_axis(ax, "y", full=False)
        axes[0].set_ylim(0.0, min(1.05 * top, 1.0))
        axes[0].set_ylabel("Share of attention")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center")
        return figure
