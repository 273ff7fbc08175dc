"""Quality of many methods at a few budgets of equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from avlprof.plots.frames import Array, count_range, need
from avlprof.plots.style import (
    INK,
    MARKERS,
    RIVALS,
    SOFT,
    TUNED,
    WIDEST,
    interval_bars,
    new_figure,
    percent_axis,
    theme,
)

REFERENCES: Mapping[str, str] = MappingProxyType({"uniform": "#4D4D4D", "random": "#9A9A9A"})
"""Grey for the two baselines that every method has to beat."""

OTHERS = RIVALS[:-1]
OWN = (TUNED, INK, RIVALS[0], RIVALS[1])
"""Colours of the methods that the comparison is about."""


@dataclass(frozen=True)
class MethodLine:
    """One method: its scores `[budgets]` with 95% intervals, NaN where it was not compared.

    `own` marks the methods that the comparison is about (tuned or given); `strongest` the budgets
    at which it was the strongest baseline on the split of selection.
    """

    method: str
    own: bool
    score: Array
    low: Array
    high: Array
    strongest: tuple[bool, ...]


@dataclass(frozen=True)
class BudgetsInfo:
    """What `quality_by_budget` draws; `dense` is (score, low, high), or None when it was not run.

    The methods that the comparison is about come first, then baselines, each from best to worst by
    how far they are above the mean of their budgets.
    """

    budgets: tuple[float, ...]
    lines: tuple[MethodLine, ...]
    dense: tuple[float, float, float] | None
    samples: str


def budgets_info(frame: pd.DataFrame) -> BudgetsInfo:
    """Scores by method and budget.

    Args:
        frame: one row per method and budget, as `Comparison.summary` gives it: `budget, method,
            kind, strongest, score, low, high, samples`; kind `dense` is the reference.

    Raises:
        UserError: a column is missing, or there is no row.
    """
    need(frame, ("budget", "method", "kind", "strongest", "score", "low", "high", "samples"), "budgets")
    reference = frame[frame["kind"] == "dense"]
    rest = frame.drop(index=reference.index)
    budgets = tuple(float(budget) for budget in sorted(rest["budget"].unique()))
    lines = []
    for method in dict.fromkeys(rest["method"]):
        part = rest[rest["method"] == method].set_index("budget").reindex(list(budgets))
        score, low, high = (part[column].to_numpy(dtype=float) for column in ("score", "low", "high"))
        own = bool((part["kind"].dropna() != "baseline").any())
        strongest = tuple(flag is True or flag is np.True_ for flag in part["strongest"])
        lines.append(MethodLine(str(method), own, score, low, high, strongest))
    usual = np.nanmean([line.score for line in lines], axis=0)
    lines.sort(key=lambda line: (not line.own, -float(np.nanmean(line.score - usual))))
    dense = None
    if not reference.empty:
        first = reference.iloc[0]
        dense = (float(first["score"]), float(first["low"]), float(first["high"]))
    return BudgetsInfo(budgets, tuple(lines), dense, count_range(frame["samples"]))


def quality_by_budget(
    source: pd.DataFrame | BudgetsInfo, score: str = "Score", score_percent: bool = True
) -> Figure:
    """A panel a budget: the score of each method with its interval, side by side; dense is the band.

    All methods of a panel have equal bytes, so across it runs no scale but the order of the
    legend. The methods that the comparison is about are stars, uniform and random are grey; a ring
    marks the strongest baseline.

    Args:
        source: a frame as `budgets_info` takes it, or that information.
        score: label of the score axis (the metric).
        score_percent: whether scores are shares, to be written as percent.
    """
    info = source if isinstance(source, BudgetsInfo) else budgets_info(source)
    rings = any(any(line.strongest) for line in info.lines)
    note = (
        f"n = {info.samples} samples, bars: 95% interval; methods of a panel have equal bytes and stand in "
        "the order of the legend"
    )
    wide = min(max(2.0, 0.6 + 0.3 * len(info.lines)), 5.0)
    with theme():
        figure = new_figure(
            "Quality at equal bytes",
            note + ("; rings: the strongest baseline on the split of selection" if rings else ""),
            (min(max(3.6 + wide * len(info.budgets), 7.5), WIDEST), 6.2),
        )
        axes = figure.subplots(1, max(len(info.budgets), 1), sharey=True, squeeze=False)[0]
        looks = _looks(info.lines)
        for column, (budget, ax) in enumerate(zip(info.budgets, axes, strict=False)):
            _reference(info, ax)
            for slot, (line, look) in enumerate(zip(info.lines, looks, strict=True)):
                _draw(line, column, float(slot), look, ax)
            ax.set_title(f"{100 * budget:.3g}% of the dense KV")
            ax.set_xlim(-0.8, len(info.lines) - 0.2)
            ax.set_xticks([])
            ax.set_xlabel("Method")
        axes[0].set_ylabel(score)
        if score_percent:
            percent_axis(axes[0], "y", full=False)
        _legend(info, looks, figure)
        return figure


def _reference(info: BudgetsInfo, ax: Axes) -> None:
    if info.dense is not None:
        mean, low, high = info.dense
        ax.axhspan(low, high, color=SOFT, alpha=0.13, linewidth=0)
        ax.axhline(mean, color=SOFT, linewidth=1.4, linestyle=(0, (5, 3)))


def _draw(line: MethodLine, column: int, slot: float, look: tuple[str, str], ax: Axes) -> None:
    import seaborn as sns

    colour, marker = look
    part = slice(column, column + 1)
    interval_bars(ax, [slot], line.low[part], line.high[part], color=colour, linewidth=2.2, alpha=0.8)
    sns.scatterplot(
        x=[slot], y=line.score[part], color=colour, marker=marker, s=220 if line.own else 80,
        edgecolor="white", linewidth=0.8, legend=False, zorder=5 if line.own else 4, ax=ax,
    )  # fmt: skip
    if line.strongest[column]:
        ax.plot([slot], line.score[part], "o", markersize=16, mfc="none", mec=INK, mew=1.3, zorder=5)


def _legend(info: BudgetsInfo, looks: Sequence[tuple[str, str]], figure: Figure) -> None:
    """Every method, also one that the first budget lacks, in the order of the panels."""
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=15 if marker == "*" else 9)
        for colour, marker in looks
    ]
    names = [line.method for line in info.lines]
    if info.dense is not None:
        handles.insert(0, Line2D([], [], color=SOFT, linewidth=1.4, linestyle=(0, (5, 3))))
        names.insert(0, "dense")
    figure.legend(handles, names, loc="outside right center")


def _looks(lines: Sequence[MethodLine]) -> list[tuple[str, str]]:
    """Colour and marker: stars for the methods of interest, grey squares for the references."""
    looks, own, others = [], 0, 0
    for line in lines:
        if line.own:
            looks.append((OWN[own % len(OWN)], "*"))
            own += 1
        elif line.method in REFERENCES:
            looks.append((REFERENCES[line.method], "s"))
        else:
            looks.append((OTHERS[others % len(OTHERS)], MARKERS[others % len(MARKERS)]))
            others += 1
    return looks
