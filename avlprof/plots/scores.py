"""Scores over bytes: what several people measured of one model, and the front of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from avlprof.errors import cut
from avlprof.plots.frames import Array, byte_unit, count_range, need
from avlprof.plots.style import (
    INK,
    MARKERS,
    RIVALS,
    SOFT,
    TUNED,
    interval_bars,
    new_figure,
    percent_axis,
    theme,
)

NAMED = 6
"""Methods that have a colour and intervals, beside uniform and random; the rest are small grey points."""
REFERENCES = {"uniform": "#4D4D4D", "random": "#9A9A9A"}
ALIKE, STEP = 0.01, 0.011
"""Shares of the dense bytes: methods so near to each other count as equal, and are drawn so far apart."""


@dataclass(frozen=True)
class ScoresInfo:
    """What `scores_by_bytes` draws: arrays over points, by bytes, and among equal bytes from the best on.

    `where` is the level of bytes that a point belongs to: those of the best among methods that hold as
    much but for 1% of the dense bytes. `named` are the methods to be told apart: those that are best at
    some level first, then by their best score. `front` holds (bytes, score) of levels whose best is better
    than all below. `dense` is (score, low, high), `dense_bytes` what it holds.
    """

    method: tuple[str, ...]
    where: Array
    score: Array
    low: Array
    high: Array
    named: tuple[str, ...]
    front: tuple[tuple[float, float], ...]
    dense: tuple[float, float, float]
    dense_bytes: float
    samples: str


def scores_info(frame: pd.DataFrame) -> ScoresInfo:
    """Points, levels and front of a table.

    Args:
        frame: one row a method and budget, as `avlprof.evaluation.leaderboard.Group.table` gives it:
            `method, kind, live_bytes, score, low, high, samples`; kind `dense` at least once.

    Raises:
        UserError: a column is missing, or there is no row.
    """
    need(frame, ("method", "kind", "live_bytes", "score", "low", "high", "samples"), "scores over bytes")
    dense = frame[frame["kind"] == "dense"].iloc[0]
    whole = float(dense["live_bytes"])
    rest = frame[frame["kind"] != "dense"].sort_values("live_bytes", kind="stable")
    level = _levels(rest["live_bytes"].to_numpy(dtype=float), ALIKE * whole)
    rest = rest.assign(level=level).sort_values(["level", "score"], ascending=[True, False], kind="stable")
    first = rest.groupby("level")["live_bytes"].first()
    leaders = rest.groupby("level").first()
    better = leaders["score"] > leaders["score"].cummax().shift(fill_value=-1.0)
    ordered = [*leaders["method"], *rest.sort_values("score", ascending=False, kind="stable")["method"]]
    named = [str(name) for name in dict.fromkeys(ordered) if reference(str(name)) is None][:NAMED]
    score, low, high = (rest[column].to_numpy(dtype=float) for column in ("score", "low", "high"))
    return ScoresInfo(
        method=tuple(map(str, rest["method"])),
        where=rest["level"].map(first).to_numpy(dtype=float),
        score=score,
        low=low,
        high=high,
        named=tuple(named),
        front=tuple(
            (float(first[level]), float(leaders["score"][level]))
            for level in leaders.index[better.to_numpy()]
        ),
        dense=(float(dense["score"]), float(dense["low"]), float(dense["high"])),
        dense_bytes=whole,
        samples=count_range(frame["samples"]),
    )


def reference(method: str) -> str | None:
    """The grey of `uniform` and `random` (x3), which every method has to beat; None of another."""
    return REFERENCES.get(method.split(" x")[0])


def scores_by_bytes(source: pd.DataFrame | ScoresInfo, title: str, score: str = "Score") -> Figure:
    """Every method at its bytes, with the interval of those that matter; the front is a line, dense the band.

    Of methods of equal bytes the best stands at its place and the others to the right of it. Of a method
    that several people measured the best is drawn large.

    Args:
        source: a table as `scores_info` takes it, or that information.
        title: which model and task.
        score: label of the score axis (the metric, a share).
    """
    info = source if isinstance(source, ScoresInfo) else scores_info(source)
    with theme():
        note = (
            f"n = {info.samples} samples, bars: 95% interval; of equal bytes the best stands at its place, "
            "others right of it; line: the best at no more bytes"
        )
        figure = new_figure("Quality over bytes", note, (12.0, 6.6), subtitle=title)
        ax = figure.subplots()
        mean, low, high = info.dense
        ax.axhspan(low, high, color=SOFT, alpha=0.13, linewidth=0)
        ax.axhline(mean, color=SOFT, linewidth=1.4, linestyle=(0, (5, 3)), label="dense")
        unit, name = byte_unit(info.dense_bytes)
        most = float(info.where.max(initial=0.0)) / unit
        if info.front:
            sizes, best = ([point[at] for point in info.front] for at in (0, 1))
            line = np.array([*sizes, most * unit]) / unit
            ax.step(line, [*best, best[-1]], where="post", color=INK, linewidth=1.4, alpha=0.5, zorder=2)
        _draw(info, ax, unit)
        whole = info.dense_bytes / unit
        ax.set_xlim(0.0, max(most * 1.04 + 0.1 * whole, 1e-9))
        percent_axis(ax, "y", full=False)
        ax.set_xlabel(f"Prompt KV in memory ({name} per prompt)")
        ax.set_ylabel(score)

        def share_of(size: ArrayLike) -> Array:
            return 100 * np.asarray(size, dtype=float) / whole

        def size_of(percent: ArrayLike) -> Array:
            return np.asarray(percent, dtype=float) * whole / 100

        ax.secondary_xaxis("top", functions=(share_of, size_of)).set_xlabel("Percent of the dense KV")
        figure.legend(loc="outside right center")
        return figure


def _levels(live: Array, alike: float) -> list[int]:
    """Number of the level of each of ascending bytes: a new one begins where they are no longer alike."""
    numbers: list[int] = []
    start = 0.0
    for at, size in enumerate(live):
        if at == 0 or size - start > alike:
            start = size
            numbers.append(numbers[-1] + 1 if numbers else 0)
        else:
            numbers.append(numbers[-1])
    return numbers


def _draw(info: ScoresInfo, ax: Axes, unit: int) -> None:
    colours = (TUNED, *RIVALS)
    looks = {
        name: (colours[at % len(colours)], MARKERS[at % len(MARKERS)]) for at, name in enumerate(info.named)
    }
    looks |= {
        name: (grey, "s") for name in dict.fromkeys(info.method) if (grey := reference(name)) is not None
    }
    shown: dict[str, list[tuple[int, float]]] = {name: [] for name in looks}
    small, slots = [], dict.fromkeys(info.where, 0)
    taken = set()
    for at, (name, where) in enumerate(zip(info.method, info.where, strict=True)):
        if name in looks and (name, where) not in taken:
            taken.add((name, where))
            shown[name].append((at, where + slots[where] * STEP * info.dense_bytes))
            slots[where] += 1
        else:
            small.append(at)
    for name, points in shown.items():
        index, places = [at for at, _ in points], np.array([place for _, place in points]) / unit
        colour, marker = looks[name]
        interval_bars(ax, places, info.low[index], info.high[index], color=colour, linewidth=1.8, alpha=0.75)
        ax.plot(
            places, info.score[index], marker, color=colour, markersize=10, markeredgecolor="white",
            markeredgewidth=0.8, linestyle="", label=cut(name, 36), zorder=5,
        )  # fmt: skip
    if small:
        ax.plot(
            info.where[small] / unit, info.score[small], "o", color="#B5B5B5", markersize=5, alpha=0.7,
            linestyle="", label="others", zorder=1.5,
        )  # fmt: skip
