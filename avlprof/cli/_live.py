"""A study while it runs: a table on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from avlprof.cli._output import cell, note
from avlprof.cli._progress import Bars, duration
from avlprof.watch import Watch

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


@dataclass
class BudgetRow:
    """What is known of the study at one budget.

    `rate` is in trials per second of this process's work; None before its first trial.
    """

    budget: float
    done: int = 0
    total: int = 0
    best: float | None = None
    how: str = ""
    rate: float | None = None
    phase: str = ""

    @property
    def left(self) -> float | None:
        """Seconds to the last trial, as far as the rate holds."""
        return (self.total - self.done) / self.rate if self.rate else None


@dataclass
class Board(Watch):
    """Collects what a search reports; `rows` are in the order in which budgets began.

    `write` takes sentences for the reader; `early` is what is going on before the first study.
    """

    write: Callable[[str], None] = note
    clock: Callable[[], float] = time.monotonic
    rows: list[BudgetRow] = field(default_factory=list)
    early: str = ""
    _began: tuple[float, int] | None = None

    def say(self, text: str) -> None:
        self.write(text)

    def budget(self, budget: float) -> None:
        self.rows.append(BudgetRow(budget))
        self._began = None

    def phase(self, name: str, done: int, total: int) -> None:
        self.early = f"{name} {done}/{total}"
        if not self.rows:
            return
        row = self.rows[-1]
        row.phase = "" if name == "knobs" and done == total else f"{name} {done}/{total}"
        if name == "trials":
            row.done, row.total = done, total
            now = self.clock()
            if self._began is None:
                self._began = (now, done)
            elif now > self._began[0]:
                row.rate = (done - self._began[1]) / (now - self._began[0])

    def trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
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
                f"{row.done}/{row.total}" if row.total else "-",
                f"{60 * row.rate:.0f}" if row.rate else "-",
                duration(row.left) if row.left else "-",
                row.phase or "done",
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
    _bars: Bars | None = None

    def budget(self, budget: float) -> None:
        super().budget(budget)
        if len(self.rows) > 1:
            self._bars = None  # phases begin anew
        note(f"budget {budget:g}")

    def phase(self, name: str, done: int, total: int) -> None:
        super().phase(name, done, total)
        if self._bars is None:
            self.stack.close()
            self._bars = Bars(self.stack)
        self._bars.phase(name, done, total)

    def trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        before = self.rows[-1].best if self.rows else None
        super().trial(study, trial)
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
        for line in live_board.cells():
            drawn.add_row(*line)
        return drawn if live_board.rows else live_board.early

    live_board = Board()
    live = stack.enter_context(Live(console=Console(stderr=True), refresh_per_second=4, get_renderable=table))
    live_board.write = lambda text: live.console.print(text, highlight=False, markup=False)
    return live_board
