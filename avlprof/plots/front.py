"""The front of a sweep: how good the tuned policies are at each budget, beside their rivals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from avlprof.plots.frames import Array, byte_unit, count_range, need
from avlprof.plots.pareto import COST_LABELS
from avlprof.plots.style import (
    MARKERS,
    RIVALS,
    SOFT,
    TUNED,
    interval_bars,
    nested,
    new_figure,
    percent_axis,
    plain_line,
    theme,
)

FIRST = "tuned"


@dataclass(frozen=True)
class FrontLine:
    """One kind of policy over budgets, arrays `[budgets]`: score with 95% interval, live share and bytes."""

    name: str
    live_share: Array
    live_bytes: Array
    score: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class FrontInfo:
    """What `budget_front` draws: tuned first, then its rivals; dense as (score, low, high), bytes."""

    lines: tuple[FrontLine, ...]
    dense: tuple[float, float, float]
    dense_bytes: float
    samples: str


def budget_front_info(frame: pd.DataFrame) -> FrontInfo:
    """Lines by policy family, in the order of first appearance, tuned first.

    Args:
        frame: one row a budget and policy: `policy, family, score, low, high, live_share, live_bytes,
            samples`; family `dense` once.

    Raises:
        UserError: a column is missing, or there is no row.
    """
    wanted = ("policy", "family", "score", "low", "high", "live_share", "live_bytes", "samples")
    need(frame, wanted, "front of budgets")
    dense = frame[frame["family"] == "dense"].iloc[0]
    rest = frame[frame["family"] != "dense"]
    names = sorted(dict.fromkeys(rest["family"]), key=lambda name: name != FIRST)
    lines = []
    for name in names:
        own = rest[rest["family"] == name].sort_values("live_share")
        columns = ("live_share", "live_bytes", "score", "low", "high")
        lines.append(FrontLine(str(name), *(own[column].to_numpy(dtype=float) for column in columns)))
    reference = (float(dense["score"]), float(dense["low"]), float(dense["high"]))
    return FrontInfo(tuple(lines), reference, float(dense["live_bytes"]), count_range(frame["samples"]))


def budget_front(source: pd.DataFrame | FrontInfo, score: str = "Score") -> Figure:
    """Score with its interval against KV in memory, a line a kind of policy; dense is the band.

    Args:
        source: a frame as `budget_front_info` takes it, or that information.
        score: label of the score axis (the metric, a share).
    """
    info = source if isinstance(source, FrontInfo) else budget_front_info(source)
    with theme():
        note = (
            f"n = {info.samples} held-out samples, bars: 95% interval; policies of equal bytes lie over "
            "each other, with wider bars behind"
        )
        figure = new_figure("Quality at each budget", note, (11.0, 6.4))
        ax = figure.subplots()
        mean, low, high = info.dense
        ax.axhspan(low, high, color=SOFT, alpha=0.13, linewidth=0)
        ax.axhline(mean, color=SOFT, linewidth=1.4, linestyle=(0, (5, 3)), label="dense")
        for rank, line in enumerate(info.lines):
            _draw(line, rank, len(info.lines), ax)
        ax.set_xlim(0.0, max(float(line.live_share.max()) for line in info.lines) * 1.12)
        percent_axis(ax, "xy", full=False)
        ax.set_xlabel(COST_LABELS["live_share"])
        ax.set_ylabel(score)
        unit, name = byte_unit(info.dense_bytes)
        whole = info.dense_bytes / unit

        def size_of(share: ArrayLike) -> Array:
            return np.asarray(share, dtype=float) * whole

        def share_of(size: ArrayLike) -> Array:
            return np.asarray(size, dtype=float) / whole

        bytes_axis = ax.secondary_xaxis("top", functions=(size_of, share_of))
        bytes_axis.set_xlabel(f"Prompt KV in memory ({name} per prompt)")
        figure.legend(loc="outside right center")
        return figure


def _draw(line: FrontLine, rank: int, count: int, ax: Axes) -> None:
    """One line at its measured bytes; what stands first in the legend is drawn in front."""
    tuned = line.name == FIRST
    colour = TUNED if tuned else RIVALS[rank % len(RIVALS)]
    front = 4 + count - rank
    interval_bars(
        ax, line.live_share, line.low, line.high, color=colour, linewidth=nested(rank, count, 1.8, 15.0),
        alpha=1.0 if rank == 0 else 0.4, zorder=front - 0.5 - count,
    )  # fmt: skip
    plain_line(
        ax, line.live_share, line.score, colour, label=line.name, marker=MARKERS[rank % len(MARKERS)],
        markersize=nested(rank, count, 9.0, 16.0), markeredgecolor="white", linewidth=2.8 if tuned else 1.6,
        zorder=front,
    )  # fmt: skip
