"""Who watches a verb at work: progress, trials, budgets and sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


class Watch:
    """What a verb tells while it works; this one shows nothing.

    Every verb that takes time takes a `watch` and calls these methods; the command line shows them
    as bars, a live table and lines. Subclass it, override what you want to see and leave the rest.
    """

    def phase(self, name: str, done: int, total: int) -> None:
        """Some units of a phase (`trace`, `trials`, `proof`, ...) are done, of `total`."""

    def trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """A trial of a study is done, by whichever worker."""

    def budget(self, budget: float) -> None:
        """The study at the next budget of a sweep begins."""

    def say(self, text: str) -> None:
        """A sentence for the reader, such as what a proof will be able to show."""


class Part(Watch):
    """Hands on what a part of a longer job tells, as progress of the whole job.

    Args:
        whole: who watches the whole.
        name: phase of the whole that all phases of the part count to.
        before: units of the whole that are done already.
        total: units of the whole; that of the part when None.
    """

    def __init__(self, whole: Watch, name: str, before: int = 0, total: int | None = None) -> None:
        self._whole, self._name, self._before, self._total = whole, name, before, total

    def phase(self, name: str, done: int, total: int) -> None:
        self._whole.phase(self._name, self._before + done, total if self._total is None else self._total)

    def trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._whole.trial(study, trial)

    def budget(self, budget: float) -> None:
        self._whole.budget(budget)

    def say(self, text: str) -> None:
        self._whole.say(text)


class Steps(Part):
    """Units of work that are done, and how many there are, of a job of several parts.

    What is told of them only rises: of parts that others did together ahead of their turn, each is
    gone through once more.
    """

    def __init__(self, watch: Watch, name: str, total: int) -> None:
        super().__init__(watch, name)
        self.done, self.total, self._told = 0, total, (-1, 0)

    def phase(self, name: str, done: int, total: int) -> None:
        done = max(self._told[0], done)
        if (done, total) != self._told:
            self._told = done, total
            super().phase(name, done, max(total, done))

    def part(self) -> Watch:
        """Who watches the part that comes next."""
        return Part(self, "", self.done, max(self.total, self.done))

    def add(self, units: int) -> None:
        """So many more are done."""
        self.done += units


SILENT: Final = Watch()
"""Shows nothing."""
