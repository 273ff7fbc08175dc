"""Watches that remember what they are told, or hand it to a function."""

from __future__ import annotations

from collections.abc import Callable

from avlprof.watch import Watch


class Counts(Watch):
    """Calls `count` with units done and units in all of every phase."""

    def __init__(self, count: Callable[[int, int], object]) -> None:
        self._count = count

    def phase(self, name: str, done: int, total: int) -> None:
        self._count(done, total)


class Counted(Watch):
    """Remembers `(done, total)` of every phase, in `calls`, and the phases' names, in `phases`."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.phases: list[str] = []

    def phase(self, name: str, done: int, total: int) -> None:
        self.calls.append((done, total))
        if name not in self.phases:
            self.phases.append(name)


class Notes(Watch):
    """`phases` are `(name, done, total)`; trials are noted by number."""

    def __init__(self):
        self.phases, self.trials, self.budgets, self.sentences = [], [], [], []

    def phase(self, name, done, total):
        self.phases.append((name, done, total))

    def trial(self, study, trial):
        self.trials.append(trial.number)

    def budget(self, budget):
        self.budgets.append(budget)

    def say(self, text):
        self.sentences.append(text)

    def counts(self, name):
        """What was done, and of how much, in one phase."""
        return [(done, total) for phase, done, total in self.phases if phase == name]
