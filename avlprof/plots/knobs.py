"""What the winner's knobs are worth."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from avlprof.plots.frames import Array, need
from avlprof.plots.style import OKABE_ITO, SOFT, named_bars, new_figure, theme


@dataclass(frozen=True)
class KnobInfo:
    """Knobs of a tuned policy, the one that matters most first, as `name: value (plain: value)`.

    `change [knobs]` is how much worse the score gets with the knob put back to plain, within
    `low` and `high`.
    """

    knobs: tuple[str, ...]
    change: Array
    low: Array
    high: Array


def knob_effects_info(frame: pd.DataFrame) -> KnobInfo:
    """Effects sorted, the largest first.

    Args:
        frame: `knob, value, plain, change, low, high`; above 0 the knob helps.

    Raises:
        UserError: a column is missing, or there is no row.
    """
    need(frame, ("knob", "value", "plain", "change", "low", "high"), "knob effects")
    ordered = frame.sort_values("change", ascending=False, kind="stable")
    names = (
        f"{knob}: {value} (plain: {plain})"
        for knob, value, plain in zip(ordered["knob"], ordered["value"], ordered["plain"], strict=True)
    )
    change, low, high = (ordered[column].to_numpy(dtype=float) for column in ("change", "low", "high"))
    return KnobInfo(tuple(names), change, low, high)


def knob_effects(source: pd.DataFrame | KnobInfo, score: str = "KL to dense (nat per token)") -> Figure:
    """What each knob of the winner is worth: bars with intervals, a knob that hurts in grey.

    Args:
        source: a frame as `knob_effects_info` takes it, or that information.
        score: the score that is lowered, with its unit.
    """
    info = source if isinstance(source, KnobInfo) else knob_effects_info(source)
    with theme():
        note = "one knob at a time, lines: 95% interval over samples; grey: the knob helps nothing or hurts"
        size = (11.0, 2.3 + 0.55 * len(info.knobs))
        figure = new_figure("What each knob of the winner is worth", note, size)
        ax = figure.subplots()
        colours = [OKABE_ITO[0] if change > 0 else SOFT for change in info.change]
        named_bars(ax, info.knobs, info.change, info.low, info.high, colours)
        ax.axvline(0.0, color=SOFT, linewidth=1.2)
        ax.set_ylabel("Knob")
        ax.set_xlabel(f"Rise of {score}\nwhen the knob goes back to plain")
        return figure
