"""Signals that end a command: as Ctrl-C does, and only once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

GRACE: Final = 3.0
"""Seconds in which further signals change nothing: what is in hand is being written."""

AGAIN: Final = 0.01
"""Seconds until a signal comes again whose exception Python did not raise."""

ENDING: Final = ("SIGINT", "SIGTERM", "SIGHUP")


class Signalled(KeyboardInterrupt):
    """A signal asked the command to end; `code` is what a shell expects, 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.code = number, 128 + number


@contextlib.contextmanager
def ending_once(last: bool = False) -> Iterator[None]:
    """Ctrl-C, TERM and HUP raise `Signalled` inside, where they are not ignored; later ones wait.

    One that comes while an object is finalised, where Python lets no exception out, comes again behind it.

    `last`: the process ends behind it, so that behind one of them TERM and HUP change its exit code no more.
    """
    first: list[float] = []

    def end(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if first and now - first[-1] < GRACE:
            return
        first.append(now)
        raise Signalled(number)

    def unraisable(about: UnraisableHookArgs) -> None:
        if isinstance(about.exc_value, Signalled):
            first.clear()
            threading.Timer(AGAIN, os.kill, (os.getpid(), about.exc_value.number)).start()
        else:
            hook(about)

    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    before = {}
    for name in ENDING:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            late = last and first and handler == signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if late else handler)
