"""The front of a sweep: how good the tuned policies are at each budget, beside their rivals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation
from numpy.typing import ArrayLike

from avlprof.plots.frames import Array, need
from avlprof.plots.pareto import COST_LABELS
from avlprof.plots.style import MARKERS, OKABE_ITO, SOFT, new_figure, percent_axis, theme

TUNED = "tuned"
APART = 7.0
"""Points (1/72 inch) between policies at one budget, so that their intervals can be told apart."""


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
    samples: int


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
    names = sorted(dict.fromkeys(rest["family"]), key=lambda name: name != TUNED)
    lines = []
    for name in names:
        own = rest[rest["family"] == name].sort_values("live_share")
        columns = ("live_share", "live_bytes", "score", "low", "high")
        lines.append(FrontLine(str(name), *(own[column].to_numpy(dtype=float) for column in columns)))
    reference = (float(dense["score"]), float(dense["low"]), float(dense["high"]))
    return FrontInfo(tuple(lines), reference, float(dense["live_bytes"]), int(frame["samples"].max()))


def budget_front(source: pd.DataFrame | FrontInfo, score: str = "Score") -> Figure:
    """Score with its interval against KV in memory, a line a kind of policy; dense is the band.

    Args:
        source: a frame as `budget_front_info` takes it, or that information.
        score: label of the score axis (the metric, a share).
    """
    info = source if isinstance(source, FrontInfo) else budget_front_info(source)
    with theme():
        note = f"n = {info.samples:,} held-out samples, bars: 95% interval, set apart sideways"
        figure = new_figure("Quality at each budget", note, (11.0, 6.2))
        ax = figure.subplots()
        mean, low, high = info.dense
        ax.axhspan(low, high, color=SOFT, alpha=0.13, linewidth=0)
        ax.axhline(mean, color=SOFT, linewidth=1.4, linestyle=(0, (5, 3)), label="dense")
        middle = (len(info.lines) - 1) / 2
        for i, line in enumerate(info.lines):
            tuned = line.name == TUNED
            colour = OKABE_ITO[1] if tuned else [c for c in OKABE_ITO if c != OKABE_ITO[1]][i % 7]
            shift = ScaledTranslation((i - middle) * APART / 72, 0, figure.dpi_scale_trans)
            spread = np.clip(np.stack([line.score - line.low, line.high - line.score]), 0, None)
            ax.errorbar(
                line.live_share,
                line.score,
                spread,
                color=colour,
                marker=MARKERS[i % len(MARKERS)],
                markersize=10 if tuned else 7,
                linewidth=2.8 if tuned else 1.4,
                linestyle="-" if len(line.score) > 1 else "none",
                elinewidth=1.5,
                capsize=3,
                label=line.name,
                transform=ax.transData + shift,
                zorder=4 if tuned else 3,
            )
        shares = np.concatenate([line.live_share for line in info.lines])
        ax.set_xlim(0.0, float(shares.max()) * 1.12)
        # drawn with a shift, data does not move the limits by itself
        bottom = min([low, *(float(line.low.min()) for line in info.lines)])
        top = max([high, *(float(line.high.max()) for line in info.lines)])
        room = 0.05 * max(top - bottom, 1e-3)
        ax.set_ylim(bottom - room, top + room)
        percent_axis(ax, "xy", full=False)
        ax.set_xlabel(COST_LABELS["live_share"])
        ax.set_ylabel(score)
        whole = info.dense_bytes / 1024

        def kib(share: ArrayLike) -> Array:
            return np.asarray(share, dtype=float) * whole

        def share_of(size: ArrayLike) -> Array:
            return np.asarray(size, dtype=float) / whole

        bytes_axis = ax.secondary_xaxis("top", functions=(kib, share_of))
        bytes_axis.set_xlabel("Prompt KV in memory (KiB per prompt)")
        figure.legend(loc="outside right center")
        return figure
