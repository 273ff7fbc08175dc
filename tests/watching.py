"""A watch that hands what it is told to a function."""

from __future__ import annotations

from collections.abc import Callable

from avlprof.watch import Watch


class Counts(Watch):
    """Calls `count` with units done and units in all of every phase."""

    def __init__(self, count: Callable[[int, int], object]) -> None:
        self._count = count

    def phase(self, name: str, done: int, total: int) -> None:
        self._count(done, total)
