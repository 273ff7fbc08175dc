"""Quality against memory: which policy to choose at a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from avlprof.plots.frames import Array, need
from avlprof.plots.style import MARKERS, OKABE_ITO, SOFT, new_figure, percent_axis, theme

COST_LABELS = {
    "live_share": "Prompt KV in memory (share of dense)",
    "read_share": "Prompt KV read per decoding step (share of dense)",
}
SAME_COST = 0.005
APART = 5.0
"""Points (1/72 inch) between families whose costs coincide, so that error bars stay legible."""


@dataclass(frozen=True)
class ParetoLine:
    """The policies of one family by cost: arrays `[policies]`; `front` marks those unbeaten.

    A policy is beaten when another, of any family but dense, costs no more and scores no less,
    and is better in one of the two.
    """

    family: str
    policies: tuple[str, ...]
    cost: Array
    score: Array
    low: Array
    high: Array
    front: tuple[bool, ...]


@dataclass(frozen=True)
class ParetoInfo:
    """What `pareto_front` draws; `dense` is (score, low, high), or None when it was not run."""

    lines: tuple[ParetoLine, ...]
    dense: tuple[float, float, float] | None
    cost: str
    note: str


def pareto_info(frame: pd.DataFrame, cost: str = "live_share") -> ParetoInfo:
    """Scores by cost, a line a policy family.

    Args:
        frame: one row a policy: `policy, score, low, high` (95% interval), the cost, optionally
            `family` (default: the policy's own name) and `n` (samples). Family `dense` is the
            reference.
        cost: column with the measured share of the dense model's KV, in [0, 1].

    Raises:
        UserError: a column is missing, or there is no row.
    """
    need(frame, ("policy", "score", "low", "high", cost), "pareto front")
    family = frame["family"] if "family" in frame.columns else frame["policy"]
    reference = frame[(family == "dense") | (frame["policy"] == "dense")]
    rest = frame.drop(index=reference.index)
    front = pd.Series(unbeaten(rest[cost].to_numpy(float), rest["score"].to_numpy(float)), index=rest.index)
    lines = []
    for name in dict.fromkeys(family[rest.index]):
        part = rest[family[rest.index] == name].sort_values(cost)
        at, mean, low, high = (
            part[column].to_numpy(dtype=float) for column in (cost, "score", "low", "high")
        )
        policies = tuple(str(policy) for policy in part["policy"])
        lines.append(
            ParetoLine(
                str(name), policies, at, mean, low, high, tuple(bool(best) for best in front[part.index])
            )
        )
    dense = None
    if not reference.empty:
        first = reference.iloc[0]
        dense = (float(first["score"]), float(first["low"]), float(first["high"]))
    count = f"n = {int(frame['n'].max()):,} samples, " if "n" in frame.columns else ""
    return ParetoInfo(
        tuple(lines), dense, cost, f"{count}bars: 95% interval, rings: no policy is better and as cheap"
    )


def unbeaten(cost: Array, score: Array) -> list[bool]:
    """Which points of `cost [n]`, `score [n]` are on the Pareto front (low cost, high score).

    Costs that differ by less than `SAME_COST` are equal: policies at one budget differ by a token
    or so a layer.
    """
    cheaper = cost[:, None] - cost[None]
    as_cheap, as_good = cheaper > -SAME_COST, score[None] >= score[:, None]
    better = (cheaper >= SAME_COST) | (score[None] > score[:, None])
    return [not bool(row.any()) for row in as_cheap & as_good & better]


def pareto_front(
    source: pd.DataFrame | ParetoInfo,
    score: str = "Score",
    cost: str = "live_share",
    score_percent: bool = True,
) -> Figure:
    """Score with its interval against measured cost; dense is the star and the band.

    Args:
        source: a frame as `pareto_info` takes it, or that information.
        score: label of the score axis (the metric).
        score_percent: whether scores are shares, to be written as percent.
    """
    info = source if isinstance(source, ParetoInfo) else pareto_info(source, cost)
    with theme():
        figure = new_figure("Quality at a budget", info.note, (10.5, 6.0))
        ax = figure.subplots()
        shifts = _shifts(info.lines)
        if info.dense is not None:
            mean, low, high = info.dense
            ax.axhspan(low, high, color=SOFT, alpha=0.13, linewidth=0)
            ax.axhline(mean, color=SOFT, linewidth=1.4, linestyle=(0, (5, 3)))
            ax.plot([1.0], [mean], "*", color="black", markersize=19, clip_on=False, zorder=6, label="dense")
        for i, (line, shift) in enumerate(zip(info.lines, shifts, strict=True)):
            _draw(line, ax, OKABE_ITO[i % 6], MARKERS[i % len(MARKERS)], shift)
        _limits(info, ax)
        ax.set_xlabel(COST_LABELS.get(info.cost, info.cost))
        ax.set_ylabel(score)
        percent_axis(ax, "xy" if score_percent else "x", full=False)
        figure.legend(loc="outside right center")
        return figure


def _draw(line: ParetoLine, ax: Axes, colour: str, marker: str, shift: float) -> None:
    moved = ax.transData + ScaledTranslation(shift / 72, 0, ax.figure.dpi_scale_trans)
    spread = np.clip(np.stack([line.score - line.low, line.high - line.score]), 0, None)
    ax.errorbar(
        line.cost, line.score, spread, fmt="none", ecolor=colour, elinewidth=1.6, capsize=3, transform=moved
    )
    ax.plot(line.cost, line.score, color=colour, marker=marker, label=line.family, transform=moved)
    edge = [cost for cost, best in zip(line.cost, line.front, strict=True) if best]
    good = [score for score, best in zip(line.score, line.front, strict=True) if best]
    ax.plot(edge, good, "o", markersize=14, markerfacecolor="none", markeredgecolor=SOFT, transform=moved)


def _shifts(lines: Sequence[ParetoLine]) -> list[float]:
    """Sideways shift of each line in points: none unless two lines share a cost."""
    costs = np.concatenate([line.cost for line in lines]) if lines else np.zeros(0)
    gaps = np.diff(np.sort(costs))
    if not len(gaps) or gaps.min() > 0.01:
        return [0.0] * len(lines)
    middle = (len(lines) - 1) / 2
    return [(i - middle) * APART for i in range(len(lines))]


def _limits(info: ParetoInfo, ax: Axes) -> None:
    costs = [float(cost) for line in info.lines for cost in line.cost]
    ends = [1.0] if info.dense is not None or not costs else []
    ax.set_xlim(0.0, min(max([*costs, *ends]) * 1.04, 1.04))
    low = [float(v) for line in info.lines for v in line.low]
    high = [float(v) for line in info.lines for v in line.high]
    if info.dense is not None:
        low.append(info.dense[1])
        high.append(info.dense[2])
    room = 0.06 * max(max(high) - min(low), 1e-3)
    ax.set_ylim(min(low) - room, max(high) + room)
