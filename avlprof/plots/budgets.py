"""Quality of many methods at a few budgets of equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from avlprof.plots.frames import Array, need
from avlprof.plots.style import INK, MARKERS, OKABE_ITO, SOFT, new_figure, percent_axis, theme

SPREAD = 0.72
"""Part of the room between two budgets that the methods of one budget take up."""
PLAIN = 6
"""Colours of the palette that stand apart; more methods than this also differ by marker and dash."""
REFERENCES: Mapping[str, str] = MappingProxyType({"uniform": "#4D4D4D", "random": "#9A9A9A"})
"""Grey for the two baselines that every method has to beat."""
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))


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
    samples: int


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
    return BudgetsInfo(budgets, tuple(lines), dense, int(frame["samples"].max()))


def quality_by_budget(
    source: pd.DataFrame | BudgetsInfo, score: str = "Score", score_percent: bool = True
) -> Figure:
    """Score of each method against the budget, a line a method with its interval; dense is the band.

    Budgets stand at equal distances, methods beside each other within one. The methods that the
    comparison is about are black stars, uniform and random are grey; a ring marks the strongest
    baseline. Several methods of interest share the star and are told apart by place, in the order
    of the legend.

    Args:
        source: a frame as `budgets_info` takes it, or that information.
        score: label of the score axis (the metric).
        score_percent: whether scores are shares, to be written as percent.
    """
    info = source if isinstance(source, BudgetsInfo) else budgets_info(source)
    rings = any(any(line.strongest) for line in info.lines)
    note = f"n = {info.samples:,} samples, bars: 95% interval"
    with theme():
        figure = new_figure(
            "Quality at equal bytes",
            note + (", rings: the strongest baseline on the split of selection" if rings else ""),
            (11.5, 6.2),
        )
        ax = figure.subplots()
        if info.dense is not None:
            mean, low, high = info.dense
            ax.axhspan(low, high, color=SOFT, alpha=0.13, linewidth=0)
            ax.axhline(mean, color=SOFT, linewidth=1.4, linestyle=(0, (5, 3)), label="dense")
        shifts = np.linspace(-SPREAD / 2, SPREAD / 2, len(info.lines)) if len(info.lines) > 1 else [0.0]
        baselines = 0
        for line, shift in zip(info.lines, shifts, strict=True):
            _draw(line, ax, float(shift), baselines)
            baselines += not line.own and line.method not in REFERENCES
        _axes(ax, info.budgets)
        ax.set_ylabel(score)
        if score_percent:
            percent_axis(ax, "y", full=False)
        figure.legend(loc="outside right center")
        return figure


def _draw(line: MethodLine, ax: Axes, shift: float, number: int) -> None:
    colour, marker, dash = _look(line, number)
    place = np.arange(len(line.score)) + shift
    spread = np.clip(np.stack([line.score - line.low, line.high - line.score]), 0, None)
    front = 5 if line.own else 3
    ax.plot(place, line.score, color=colour, linestyle=dash, linewidth=2.4 if line.own else 1.1,
            alpha=1.0 if line.own else 0.45, zorder=front - 1)  # fmt: skip
    ax.errorbar(
        place, line.score, spread, fmt=marker, color=colour, markersize=14 if line.own else 7,
        elinewidth=1.6, capsize=2.5, label=line.method, zorder=front,
    )  # fmt: skip
    ringed = np.array(line.strongest)
    ax.plot(place[ringed], line.score[ringed], "o", markersize=15, markerfacecolor="none",
            markeredgecolor=INK, zorder=front)  # fmt: skip


def _look(line: MethodLine, number: int) -> tuple[str, str, object]:
    """Colour, marker and dash: black for the methods of interest, grey for the two references."""
    if line.own:
        return "#000000", "*", "-"
    if line.method in REFERENCES:
        return REFERENCES[line.method], "o" if line.method == "uniform" else "X", "-"
    return OKABE_ITO[number % PLAIN], MARKERS[number % len(MARKERS)], DASHES[number // PLAIN % len(DASHES)]


def _axes(ax: Axes, budgets: Sequence[float]) -> None:
    ax.set_xlim(-0.5, len(budgets) - 0.5)
    ax.set_xticks(range(len(budgets)), [f"{100 * budget:.3g}%" for budget in budgets])
    for edge in range(1, len(budgets)):
        ax.axvline(edge - 0.5, color=SOFT, linewidth=0.8, alpha=0.5)
    ax.grid(False, axis="x")
    ax.set_xlabel("Budget: prompt KV in memory (share of dense)")
