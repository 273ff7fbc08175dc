"""Quality against memory: which policy to choose at a budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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

COST_LABELS = {
    "live_share": "Prompt KV in memory (share of dense)",
    "read_share": "Prompt KV read per decoding step (share of dense)",
}
SAME_COST = 0.005
LONGEST = 24
"""Characters of a policy's name on the axis."""
CROWDED = 10
"""More policies than this have their names upright."""


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
    count = f"n = {count_range(frame['n'])} samples, " if "n" in frame.columns else ""
    rings = f"rings: no policy is better and as cheap (costs within {100 * SAME_COST:g} points are equal)"
    note = f"{count}bars: 95% interval, band: that of dense, {rings}"
    return ParetoInfo(tuple(lines), dense, cost, note)


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
    """Left: score against measured cost, every policy at its own bytes; dense is the star and the band.

    Right, on the same axis of scores: each policy by name, family by family, with its interval.
    So policies of equal cost, which lie over each other on the left, can be told apart.

    Args:
        source: a frame as `pareto_info` takes it, or that information.
        score: label of the score axis (the metric).
        score_percent: whether scores are shares, to be written as percent.
    """
    info = source if isinstance(source, ParetoInfo) else pareto_info(source, cost)
    names = sum(len(line.policies) for line in info.lines)
    wide = min(max(2.6, 0.9 + 0.42 * names), WIDEST - 6.9)
    with theme():
        figure = new_figure("Quality at a budget", info.note, (6.9 + wide, 6.6))
        plane, named = figure.subplots(1, 2, sharey=True, width_ratios=[6.0, wide])
        for ax in (plane, named):
            _reference(info, ax)
        slot = 0
        for i, line in enumerate(info.lines):
            colour = TUNED if line.family == "tuned" else RIVALS[i % len(RIVALS)]
            marker = MARKERS[i % len(MARKERS)]
            _points(line, line.cost, plane, colour, marker)
            slots = slot + np.arange(len(line.policies), dtype=float)
            interval_bars(named, slots, line.low, line.high, color=colour, linewidth=2.2, alpha=0.8)
            _points(line, slots, named, colour, marker)
            slot += len(line.policies)
        _limits(info, plane)
        plane.set_xlabel(COST_LABELS.get(info.cost, info.cost))
        plane.set_ylabel(score)
        percent_axis(plane, "xy" if score_percent else "x", full=False)
        _names(info, named)
        return figure


def _reference(info: ParetoInfo, ax: Axes) -> None:
    if info.dense is None:
        return
    mean, low, high = info.dense
    ax.axhspan(low, high, color=SOFT, alpha=0.13, linewidth=0)
    ax.axhline(mean, color=SOFT, linewidth=1.4, linestyle=(0, (5, 3)))


def _points(line: ParetoLine, where: Array, ax: Axes, colour: str, marker: str) -> None:
    """The policies of a family at `where`; the front has rings."""
    import seaborn as sns

    if ax.get_subplotspec().is_first_col() and len(where) > 1:  # type: ignore[union-attr]
        ax.plot(where, line.score, color=colour, linewidth=1.6, alpha=0.7)
    sns.scatterplot(
        x=where, y=line.score, color=colour, marker=marker, s=90, edgecolor="white", linewidth=0.9,
        label=line.family, legend=False, zorder=4, ax=ax,
    )  # fmt: skip
    best = np.array(line.front, dtype=bool)
    ax.plot(where[best], line.score[best], "o", markersize=15, mfc="none", mec=INK, mew=1.2, zorder=5)


def _names(info: ParetoInfo, ax: Axes) -> None:
    names = [_short(policy) for line in info.lines for policy in line.policies]
    upright = len(names) > CROWDED
    turn = {"rotation": 90} if upright else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(range(len(names)), names, fontsize=12.5 if upright else 11.5, **turn)
    ax.set_xlim(-0.7, max(len(names), 1) - 0.3)
    ax.set_xlabel("Policy")
    ax.grid(False, axis="x")
    ax.tick_params(axis="y", length=0)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _limits(info: ParetoInfo, ax: Axes) -> None:
    costs = [float(cost) for line in info.lines for cost in line.cost]
    ends = [1.0] if info.dense is not None or not costs else []
    most = max([*costs, *ends])
    ax.set_xlim(0.0, 1.05 * most)
    low = [float(end) for line in info.lines for end in (*line.low, *line.score)]
    high = [float(end) for line in info.lines for end in (*line.high, *line.score)]
    if info.dense is not None:
        mean, *ends = info.dense
        low, high = [*low, ends[0], mean], [*high, ends[1], mean]
        ax.plot([1.0], [mean], "*", color="black", markersize=19, clip_on=False, zorder=6, label="dense")
        ax.annotate(
            "dense", (1.0, mean), (-14, 8), textcoords="offset points", ha="right", color=INK, fontsize=12.5
        )
    bottom, top = float(np.nanmin(low)), float(np.nanmax(high))
    room = 0.06 * max(top - bottom, 1e-3)
    ax.set_ylim(bottom - room, top + room)
