"""The course of a study: every trial's value and the best so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from avlprof.errors import UserError
from avlprof.plots.frames import Array, need
from avlprof.plots.style import INK, OKABE_ITO, SOFT, new_figure, plain_line, theme

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class TrialInfo:
    """Trials by number: `complete` and `pruned` with values, `failed` without.

    `best` is the best complete value up to and including each complete trial.
    """

    complete: tuple[int, ...]
    values: Array
    best: Array
    pruned: tuple[int, ...]
    pruned_values: Array
    failed: tuple[int, ...]
    best_trial: int
    direction: Direction

    @property
    def last(self) -> int:
        """Number of the last trial that ended, however it did."""
        return max((*self.complete, *self.pruned, *self.failed))


def trial_history_info(frame: pd.DataFrame, direction: Direction = "minimize") -> TrialInfo:
    """Values by trial.

    Args:
        frame: `trial, value, state`; states as Optuna names them (`COMPLETE`, `PRUNED`, `FAIL`),
            in any case. Trials that wait or run are left out.
        direction: whether small or large values are good.

    Raises:
        UserError: a column is missing, or no trial is complete.
    """
    need(frame, ("trial", "value", "state"), "trial history")
    ordered = frame.sort_values("trial")
    state = ordered["state"].astype(str).str.upper().str.removeprefix("TRIALSTATE.")
    valued = ordered["value"].notna()
    complete, pruned = ordered[(state == "COMPLETE") & valued], ordered[(state == "PRUNED") & valued]
    if complete.empty:
        raise UserError(
            "figure 'trial history' needs a complete trial, the study has none; let it run longer"
        )
    values = complete["value"].to_numpy(dtype=float)
    lower = direction == "minimize"
    best = np.minimum.accumulate(values) if lower else np.maximum.accumulate(values)
    numbers = tuple(int(i) for i in complete["trial"])
    return TrialInfo(
        numbers,
        values,
        best,
        tuple(int(i) for i in pruned["trial"]),
        pruned["value"].to_numpy(dtype=float),
        tuple(int(i) for i in ordered.loc[state == "FAIL", "trial"]),
        numbers[int(values.argmin() if lower else values.argmax())],
        direction,
    )


def trial_history(
    source: pd.DataFrame | TrialInfo,
    value: str = "Mean KL to dense (nat)",
    direction: Direction = "minimize",
    second: int | None = None,
    third: int | None = None,
) -> Figure:
    """Every trial's value, the best so far as a line, and the winner as a star.

    Args:
        source: a frame as `trial_history_info` takes it, or that information.
        value: label of the value axis, with its unit.
        second: first trial of the stage that moves layers; a line is drawn before it.
        third: the same of the stage that moves KV heads.
    """
    info = source if isinstance(source, TrialInfo) else trial_history_info(source, direction)
    with theme():
        note = f"{len(info.complete)} complete, {len(info.pruned)} pruned, {len(info.failed)} failed"
        figure = new_figure("How the search went", note)
        ax = figure.subplots()
        _draw(info, ax)
        _winner(info, ax)
        _stage(ax, second, "layer by layer", 0)
        _stage(ax, third, "head by head", 1)
        values = [*info.values, *info.pruned_values]
        room = 0.2 * ((max(values) - min(values)) or 1.0)
        ax.set_ylim(min(values) - room, max(values) + room)
        end = info.last
        ax.set_xlabel("Trial")
        ax.set_ylabel(f"{value}\n{'lower' if info.direction == 'minimize' else 'higher'} is better")
        ax.set_xlim(-0.02 * end - 0.6, 1.02 * end + 0.6)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        figure.legend(loc="outside right center")
        return figure


def _stage(ax: Axes, first: int | None, name: str, line: int) -> None:
    """A line before the first trial of a stage, with its name in that line of text from the top."""
    if first is None:
        return
    ax.axvline(first - 0.5, color=SOFT, linewidth=1.2, linestyle=(0, (2, 2)))
    ax.annotate(
        name, (first - 0.5, 1.0), xycoords=ax.get_xaxis_transform(), xytext=(7, -17 * line),
        textcoords="offset points", va="top", fontsize=12.5, color=SOFT,
    )  # fmt: skip


def _draw(info: TrialInfo, ax: Axes) -> None:
    import seaborn as sns

    numbers, values = [*info.complete, info.last], np.array([*info.best, info.best[-1]])
    plain_line(ax, numbers, values, OKABE_ITO[1], drawstyle="steps-post", label="Best so far")
    dots = {"s": 48, "legend": False, "ax": ax}
    sns.scatterplot(
        x=info.complete, y=info.values, color=OKABE_ITO[0], alpha=0.75, linewidth=0, label="Complete", **dots
    )
    if info.pruned:
        sns.scatterplot(
            x=info.pruned, y=info.pruned_values, facecolor="none", edgecolor=SOFT, linewidth=1.3,
            label="Pruned (partial)", **dots,
        )  # fmt: skip
    if info.failed:
        bottom = np.full(len(info.failed), 0.025)
        ax.scatter(
            info.failed,
            bottom,
            marker="x",
            color=INK,
            transform=ax.get_xaxis_transform(),
            label="Failed",
            zorder=6,
        )


def _winner(info: TrialInfo, ax: Axes) -> None:
    """A star at the best trial, with its number and value on the side where nothing is better."""
    best, lower = float(info.best[-1]), info.direction == "minimize"
    ax.scatter([info.best_trial], [best], s=300, marker="*", color=OKABE_ITO[1], edgecolors="white", zorder=5)
    ax.annotate(
        f"trial {info.best_trial}: {best:.4g}",
        (info.best_trial, best),
        xytext=(0, -12 if lower else 12),
        textcoords="offset points",
        ha="right" if info.best_trial > info.last / 2 else "left",
        va="top" if lower else "bottom",
        fontsize=12.5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )
