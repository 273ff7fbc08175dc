"""Which knobs of a search mattered."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from avlprof.plots.frames import Array, need
from avlprof.plots.style import OKABE_ITO, new_figure, theme


@dataclass(frozen=True)
class ImportanceInfo:
    """Parameters, the most important first, and their shares (sum 1 unless all are 0)."""

    parameters: tuple[str, ...]
    shares: Array


def parameter_importances_info(frame: pd.DataFrame) -> ImportanceInfo:
    """Importances as shares, sorted.

    Args:
        frame: `parameter, importance` (0 or more).

    Raises:
        UserError: a column is missing, or there is no row.
    """
    need(frame, ("parameter", "importance"), "parameter importances")
    ordered = frame.sort_values("importance", ascending=False, kind="stable")
    shares = ordered["importance"].to_numpy(dtype=float)
    total = shares.sum()
    return ImportanceInfo(
        tuple(str(name) for name in ordered["parameter"]), shares / total if total > 0 else shares
    )


def parameter_importances(source: pd.DataFrame | ImportanceInfo) -> Figure:
    """Bars: how much each searched parameter mattered, by whatever measure the caller took."""
    info = source if isinstance(source, ImportanceInfo) else parameter_importances_info(source)
    with theme():
        figure = new_figure("Which knobs mattered", "", (10.0, 1.9 + 0.5 * len(info.parameters)))
        ax = figure.subplots()
        bars = ax.barh(range(len(info.parameters)), info.shares, 0.66, color=OKABE_ITO[0])
        ax.bar_label(bars, [f"{share:.0%}" for share in info.shares], padding=5, fontsize=12.5)
        ax.set_yticks(range(len(info.parameters)), info.parameters)
        ax.invert_yaxis()
        ax.set_xlim(0, max(float(info.shares.max()) * 1.12, 0.01))
        ax.xaxis.set_major_formatter("{x:.0%}")
        ax.grid(False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel("Share of importance")
        ax.set_ylabel("Parameter")
        return figure
