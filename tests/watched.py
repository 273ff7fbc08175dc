"""A watch that remembers what it was told."""

from __future__ import annotations

from avlprof.watch import Watch


class Counted(Watch):
    """Remembers `(done, total)` of every phase, in `calls`, and the phases' names, in `phases`."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        self.phases: list[str] = []

    def phase(self, name: str, done: int, total: int) -> None:
        self.calls.append((done, total))
        if name not in self.phases:
            self.phases.append(name)
