"""Which parameters the score of a search depends on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from avlprof.plots.frames import Array, need
from avlprof.plots.style import OKABE_ITO, SOFT, named_bars, new_figure, percent_axis, theme


@dataclass(frozen=True)
class ImportanceInfo:
    """Parameters of a search, the most important first; `importance [parameters]` adds up to 1.

    `low` and `high` are 95% of what resampled trials give; `trials` is how many there are.
    """

    parameters: tuple[str, ...]
    importance: Array
    low: Array
    high: Array
    trials: int


def parameter_importances_info(frame: pd.DataFrame) -> ImportanceInfo:
    """Importances sorted, the largest first.

    Args:
        frame: `parameter, importance, low, high, trials`.

    Raises:
        UserError: a column is missing, or there is no row.
    """
    need(frame, ("parameter", "importance", "low", "high", "trials"), "parameter importances")
    ordered = frame.sort_values("importance", ascending=False, kind="stable")
    importance, low, high = (ordered[name].to_numpy(dtype=float) for name in ("importance", "low", "high"))
    names = tuple(name.replace("_", " ") for name in ordered["parameter"].astype(str))
    return ImportanceInfo(names, importance, low, high, int(ordered["trials"].max()))


def parameter_importances(source: pd.DataFrame | ImportanceInfo, score: str = "score") -> Figure:
    """How much of the variance of the score each parameter explains: bars with intervals.

    Args:
        source: a frame as `parameter_importances_info` takes it, or that information.
        score: the score whose variance is explained, in words.
    """
    info = source if isinstance(source, ImportanceInfo) else parameter_importances_info(source)
    with theme():
        note = (
            f"fANOVA over {info.trials} scalar trials; lines: 95% of resampled trials. The sampler looked "
            "more where scores are good, and differences among the best policies hardly count here"
        )
        figure = new_figure("What the score depends on", note, (11.0, 2.6 + 0.52 * len(info.parameters)))
        ax = figure.subplots()
        colours = [OKABE_ITO[0]] * len(info.parameters)
        named_bars(ax, info.parameters, info.importance, info.low, info.high, colours)
        for row, (share, end) in enumerate(zip(info.importance, info.high, strict=True)):
            ax.annotate(
                f"{100 * share:.0f}%" if share >= 0.01 else "< 1%",
                (np.fmax(share, end), row),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                color=SOFT,
                fontsize=12.5,
            )
        percent_axis(ax, "x")
        ax.set_xlim(0.0, 1.1)
        ax.set_xticks([0.0, 0.25, 0.5, 0.75, 1.0])
        ax.set_ylabel("Parameter")
        ax.set_xlabel(f"Share of the variance of {score}\nthat the parameter explains by itself")
        return figure
