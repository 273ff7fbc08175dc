"""A study while it runs: a table on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from avlprof.cli._output import cell, note
from avlprof.cli._progress import duration, phases

if TYPE_CHECKING:
    import optuna


@dataclass
class BudgetRow:
    """What is known of the study at one budget.

    `rate` is in trials per second of this process's work; None before its first trial.
    """

    budget: float
    done: int = 0
    wanted: int = 0
    best: float | None = None
    how: str = ""
    rate: float | None = None
    phase: str = ""

    @property
    def left(self) -> float | None:
        """Seconds to the last trial, as far as the rate holds."""
        return (self.wanted - self.done) / self.rate if self.rate else None


@dataclass
class Board:
    """Collects what a search reports; `rows` are in the order in which budgets began.

    Its methods are the callbacks of `avlprof.tune`, and `tell` takes sentences for the reader.
    `early` is what is going on before the first study.
    """

    tell: Callable[[str], None] = note
    clock: Callable[[], float] = time.monotonic
    rows: list[BudgetRow] = field(default_factory=list)
    early: str = ""
    _began: tuple[float, int] | None = None

    def on_budget(self, budget: float) -> None:
        """A study at a budget begins."""
        self.rows.append(BudgetRow(budget))
        self._began = None

    def progress(self, phase: str, done: int, total: int) -> None:
        """Units of a phase are done."""
        self.early = f"{phase} {done}/{total}"
        if not self.rows:
            return
        row = self.rows[-1]
        row.phase = "" if phase == "knobs" and done == total else f"{phase} {done}/{total}"
        if phase == "trials":
            row.done, row.wanted = done, total
            now = self.clock()
            if self._began is None:
                self._began = (now, done)
            elif now > self._began[0]:
                row.rate = (done - self._began[1]) / (now - self._began[0])

    def on_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """A trial has ended."""
        if not self.rows or trial.value is None or not trial.user_attrs.get("complete"):
            return
        row = self.rows[-1]
        if row.best is None or trial.value < row.best:
            row.best, row.how = trial.value, describe(trial.params)

    def cells(self) -> list[list[str]]:
        """The table's cells, a line a budget."""
        return [
            [
                f"{row.budget:g}",
                cell(row.best),
                row.how or "-",
                f"{row.done}/{row.wanted}" if row.wanted else "-",
                f"{60 * row.rate:.0f}" if row.rate else "-",
                duration(row.left) if row.left else "-",
                row.phase or "proved",
            ]
            for row in self.rows
        ]


HEADINGS = ("budget", "best score", "by", "trials", "trials/min", "trials end in", "now")


def describe(params: dict[str, Any]) -> str:
    """A trial's policy in a few words."""
    if "allocator" not in params:
        return "layer by layer"
    return f"{params['allocator']}, {params['scorer']}, mix {params['mix']:.2f}"


@contextlib.contextmanager
def board() -> Iterator[Board]:
    """A board that is drawn on a terminal, and told in lines elsewhere."""
    with contextlib.ExitStack() as stack:
        yield _drawn(stack) if sys.stderr.isatty() else _Lines(stack=stack)


@dataclass
class _Lines(Board):
    """A board for logs: every trial that is the best so far, and how far each phase is."""

    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _report: Callable[[str, int, int], None] | None = None

    def on_budget(self, budget: float) -> None:
        super().on_budget(budget)
        if len(self.rows) > 1:
            self._report = None  # phases begin anew
        note(f"budget {budget:g}")

    def progress(self, phase: str, done: int, total: int) -> None:
        super().progress(phase, done, total)
        if self._report is None:
            self.stack.close()
            self._report = self.stack.enter_context(phases())
        self._report(phase, done, total)

    def on_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        before = self.rows[-1].best if self.rows else None
        super().on_trial(study, trial)
        if self.rows and self.rows[-1].best != before:
            note(f"trial {trial.number}: {trial.value:.4f} ({describe(trial.params)})")


def _drawn(stack: contextlib.ExitStack) -> Board:
    from rich import box
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    def table() -> Any:
        drawn = Table(box=box.SIMPLE_HEAD)
        for name in HEADINGS:
            drawn.add_column(name, justify="left" if name in ("by", "now") else "right")
        for line in shown.cells():
            drawn.add_row(*line)
        return drawn if shown.rows else shown.early

    shown = Board()
    live = stack.enter_context(Live(console=Console(stderr=True), refresh_per_second=4, get_renderable=table))
    shown.tell = lambda sentence: live.console.print(sentence, highlight=False, markup=False)
    return shown
