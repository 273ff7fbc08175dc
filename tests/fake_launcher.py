"""A launcher whose workers are threads of this process, which may be lost with a task in hand."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from avlprof.api.trace import QUEUE
from avlprof.launchers import LAUNCHERS, Launcher, Started
from avlprof.launchers.queue import Queue
from tests.watching import Notes


class LostError(Exception):
    """Ends a thread as a node that is switched off ends a process: nothing is written, nothing cleared up."""


class Losing(Queue):
    """The queue of a worker that is lost with its first task in hand."""

    def tasks(self, worker):
        for _ in super().tasks(worker):
            raise LostError
        yield from ()


class Held(Notes):
    """Holds who leads until another has a task in hand, or was lost with it."""

    def __init__(self, folder, begun, losing):
        super().__init__()
        self._folder, self._begun, self._losing, self._held = folder, begun, losing, False

    def phase(self, name, done, total):
        super().phase(name, done, total)
        until = time.monotonic() + 60
        while not self._held and list(self._folder.glob(".team/queue-*/todo/*")):
            assert time.monotonic() < until
            lost = [one.code() for one in self._begun[: self._losing]]
            taken = list(self._folder.glob(".team/queue-*/taken/*.w*"))
            self._held = all(code == -9 for code in lost) if self._losing else bool(taken)
            time.sleep(0.005)


class Thread(Started):
    """`work(queue, worker)` in a thread."""

    def __init__(self, job, work, lost):
        below = job.environment.get(QUEUE) or next(word for word in job.words if word.startswith("/"))
        self.queue = Path(below)
        self.lost, self._code, self._said = lost, None, ""
        self._thread = threading.Thread(target=self._run, args=(job.name, work))
        self._thread.start()

    def _run(self, name, work):
        try:
            work((Losing if self.lost else Queue)(self.queue), name)
            self._code = 0
        except LostError:
            self._code = -9
        except BaseException as error:
            self._said, self._code = f"error: {error}", 2

    def code(self):
        return self._code

    def last_words(self):
        return self._said

    def stop(self):
        pass

    def end(self, seconds):
        pass


@contextlib.contextmanager
def threads(monkeypatch, work, losing=0):
    """The launcher `threads`, of which the first `losing` workers are lost; gives the list of all."""
    begun = []

    @dataclass(frozen=True)
    class Threads(Launcher):
        @contextlib.contextmanager
        def session(self, scratch):
            def start(job):
                begun.append(Thread(job, work, len(begun) < losing))
                return begun[-1]

            yield start

    monkeypatch.setattr(LAUNCHERS, "get", lambda name: Threads)
    yield begun
    for one in begun:
        one._thread.join(30)
        assert not one._thread.is_alive()
