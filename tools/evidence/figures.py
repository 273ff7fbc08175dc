"""The two figures of a model: what its layers do, and who is closest to dense at equal bytes."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from avlprof.plots.style import (
    INK,
    MARKERS,
    MODALITY_COLOURS,
    RIVALS,
    SOFT,
    TUNED,
    Array,
    interval_bars,
    layer_axis,
    new_figure,
    percent_axis,
    theme,
)
from avlprof.tuning.rivals import LAST, RANDOM, SAME, SIXTEEN, UNIFORM
from tools.evidence.measure import DERIVED
from tools.evidence.results import AtShare, Measured

SHADES = ("#B8440A", "#E58A52", "#F6CDB3")
"""Tuned shares from the smallest budget to the largest: of less KV, darker."""
LOST = "#7A4E8C"
LABELLED = 12
"""Layers up to which bars say their bits."""


def layers_figure(measured: Measured) -> Figure:
    """By layer: attention on vision, KL without that layer's vision KV, and what the winners keep."""
    with theme():
        note = (
            f"attention: n = {int(measured.attention()['n'].max())} traced samples; "
            f"KL: n = {measured.plan.held_out} held-out samples; whiskers: 95% intervals"
        )
        figure = new_figure(f"{measured.plan.model}: where it looks, and what it needs", note, (11.0, 9.6))
        top, middle, bottom = figure.subplots(3, 1, sharex=True)
        layers = np.arange(measured.layers, dtype=float)
        looks = measured.attention()
        _bars(top, looks, MODALITY_COLOURS["vision"])
        top.set_title("Attention on vision while decoding")
        percent_axis(top, "y", full=False)
        if measured.damage is not None:
            scores = measured.layer_damage()[:-1]
            lost = pd.DataFrame([(s.mean, s.low, s.high) for s in scores], columns=["mean", "low", "high"])
            _bars(middle, lost, LOST)
        middle.set_title("KL to dense when this layer alone has no vision KV (nat a token)")
        _kept(bottom, layers, measured)
        for ax in (top, middle):
            layer_axis(ax, range(measured.layers), label=False)
        layer_axis(bottom, range(measured.layers))
        return figure


def _bars(ax: Axes, rows: pd.DataFrame, colour: str) -> None:
    """A bar a layer with its interval; rows `mean, low, high`."""
    mean, low, high = (rows[name].to_numpy(dtype=float) for name in ("mean", "low", "high"))
    where = np.arange(len(rows), dtype=float)
    ax.bar(where, mean, 0.78, color=colour, linewidth=0)
    interval_bars(ax, where, low, high, color=INK, linewidth=1.6)
    ax.set_ylim(0.0, None)


def _kept(ax: Axes, where: Array, measured: Measured) -> None:
    """What the winners keep, bars beside each other, the smallest budget first."""
    count = max(len(measured.budgets), 1)
    width = 0.84 / count
    for number, at in enumerate(measured.budgets):
        keep = at.policy.keep(measured.layers)
        place = where + (number - (count - 1) / 2) * width
        bars = ax.bar(
            place, keep, width, color=SHADES[number % 3], linewidth=0, label=f"budget {at.share:.0%}"
        )
        if measured.layers <= LABELLED:
            ax.bar_label(
                bars,
                [str(bits) for bits in at.policy.bits(measured.layers)],
                padding=2,
                fontsize=10.5,
                color=SOFT,
            )
    bits = "; numbers: bits" if measured.layers <= LABELLED else ""
    ax.set_title(f"Vision tokens that tuned keeps{bits}")
    percent_axis(ax, "y")
    ax.set_ylim(0.0, 1.14 if bits else 1.0)
    if measured.budgets:
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=count)


def methods_of(at: AtShare) -> list[tuple[str, str]]:
    """Methods that a table shows, with the words for each, best known first."""
    words = {
        "tuned": "**tuned**",
        SAME: "uniform, the winner's ranking and bits",
        SIXTEEN: "uniform, the winner's ranking, 16 bits",
        UNIFORM: "uniform, the default ranking, 16 bits",
        LAST: "uniform, A-VL's ranking, 16 bits",
        RANDOM: "random, three seeds, 16 bits",
        DERIVED: "derived from attention, no search, 16 bits",
    }
    words.setdefault(at.strongest, f"`{at.strongest}`")
    words[at.strongest] += " (strongest rival)"
    return [(name, text) for name, text in words.items() if name in at.methods]


def budgets_figure(measured: Measured) -> Figure:
    """KL to dense and tokens that are dense's, by budget and method."""
    kinds = {
        "tuned": "tuned",
        "strongest": "strongest\nrival",
        "flat": "uniform, winner's\nranking and bits",
        UNIFORM: "uniform, default\nranking, 16 bits",
        LAST: "uniform, A-VL's\nranking, 16 bits",
        RANDOM: "random,\n16 bits",
    }
    with theme():
        note = (
            f"n = {measured.plan.held_out} held-out samples; bars: 95% interval; equal bytes within a budget"
        )
        title = f"{measured.plan.model}: how close to dense at equal bytes"
        figure = new_figure(title, note, (13.0, 5.4))
        left, right = figure.subplots(1, 2)
        for ax, column in ((left, "kl"), (right, "agreement")):
            for rank, kind in enumerate(kinds):
                _points(ax, measured.compared, column, kind, rank, len(kinds))
            ax.set_xticks(range(len(measured.compared)), [f"{at.share:.0%}" for at in measured.compared])
            ax.set_xlabel("Budget (share of the vision KV)")
            ax.grid(False, axis="x")
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        left.yaxis.set_minor_formatter(NullFormatter())
        left.set_title("KL to dense (nat a token, log scale)")
        right.set_title("Tokens that are dense's own")
        percent_axis(right, "y", full=False)
        handles, _ = left.get_legend_handles_labels()
        figure.legend(handles, list(kinds.values()), loc="outside right center")
        return figure


def _points(ax: Axes, budgets: list[AtShare], column: str, kind: str, rank: int, count: int) -> None:
    where, scores = [], []
    for number, at in enumerate(budgets):
        name = {"strongest": at.strongest, "flat": at.flat}.get(kind, kind)
        if name in at.methods and (name == kind or name != "tuned"):
            where.append(number + (rank - (count - 1) / 2) * 0.14)
            scores.append(at.of(name, column))
    colour = TUNED if kind == "tuned" else RIVALS[rank % len(RIVALS)]
    low, high = (np.array([getattr(s, end) for s in scores]) for end in ("low", "high"))
    interval_bars(ax, where, low, high, color=colour, linewidth=2.4, alpha=0.8)
    means = [score.mean for score in scores]
    ax.plot(where, means, MARKERS[rank], color=colour, markersize=7, markeredgecolor="white", label=kind)
