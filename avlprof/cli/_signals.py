"""Signals that end a command: as Ctrl-C does, and only once."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Final

GRACE: Final = 3.0
"""Seconds in which further signals change nothing: what is in hand is being written."""

ENDING: Final = ("SIGINT", "SIGTERM", "SIGHUP")


class Signalled(KeyboardInterrupt):
    """A signal asked the command to end; `code` is what a shell expects, 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


@contextlib.contextmanager
def ending_once(last: bool = False) -> Iterator[None]:
    """Ctrl-C, TERM and HUP raise `Signalled` inside, where they are not ignored; later ones wait.

    `last`: the process ends behind it, so that behind one of them TERM and HUP change its exit code no more.
    """
    first: list[float] = []

    def end(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if first and now - first[-1] < GRACE:
            return
        first.append(now)
        raise Signalled(number)

    before = {}
    for name in ENDING:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            late = last and first and handler == signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if late else handler)
