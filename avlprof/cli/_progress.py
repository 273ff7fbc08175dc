"""How far work is, on stderr: a bar on a terminal, lines elsewhere, and no chatter of libraries."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from avlprof.cli._output import note
from avlprof.watch import Watch

_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No warnings and no logs of other libraries inside; avlprof's own warnings as single lines.

    What the environment sets by itself wins, and everything is as before on exit.
    """
    set_here = {name: value for name, value in _QUIET.items() if name not in os.environ}
    root, own = logging.getLogger(), logging.getLogger("avlprof")
    silent, own_lines = logging.NullHandler(), logging.StreamHandler()
    own_lines.setFormatter(logging.Formatter("warning: %(message)s"))
    own_lines.setLevel(logging.WARNING)
    os.environ.update(set_here)
    root.addHandler(silent)
    own.addHandler(own_lines)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        own.removeHandler(own_lines)
        root.removeHandler(silent)
        for name in set_here:
            os.environ.pop(name, None)


EVERY_SECONDS = 10.0
Report = Callable[[int, int], None]


@contextlib.contextmanager
def progress(
    label: str, unit: str = "samples", resumes: bool = False, begun: bool = False
) -> Iterator[Report]:
    """A function that takes items done and items wanted, and shows rate and remaining time.

    With `resumes`, the first call tells what an earlier process did, which does not count in the
    rate. With `begun`, work was under way before: the first call only starts the clock.
    """
    if sys.stderr.isatty():
        with _bar(label, unit) as report:
            yield report
    else:
        yield _lines(label, unit, resumes, begun)


def _lines(label: str, unit: str, resumes: bool, begun: bool) -> Report:
    began = reported = time.monotonic()
    before: int | None = None if resumes or begun else 0

    def name(count: int) -> str:
        return unit.removesuffix("s") if count == 1 else unit

    def report(done: int, total: int) -> None:
        nonlocal began, reported, before
        now = time.monotonic()
        if before is None:
            before, began, reported = done, now, now
            if resumes and done:
                note(f"{label}: {done} of {total} {name(total)} were done before")
            if not begun or done < total:
                return
        if done < total and now - reported < EVERY_SECONDS:
            return
        reported = now
        rate = (done - before) / (now - began) if now > began else 0.0
        left = f", {duration((total - done) / rate)} left" if done < total and rate > 0 else ""
        speed = f", {rate:.3g} {unit}/s" if rate > 0 else ""
        note(f"{label}: {done} of {total} {name(total)}{speed}{left}")

    return report


@contextlib.contextmanager
def _bar(label: str, unit: str) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        """Items a second."""

        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:.3g} {unit}/s" if task.speed else f"- {unit}/s")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: list[Any] = []

        def report(done: int, total: int) -> None:
            if tasks:
                bar.update(tasks[0], completed=done, total=total)
            else:
                tasks.append(bar.add_task(label, total=total, completed=done))

        yield report


def duration(seconds: float) -> str:
    """A time span as `45 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Bars(Watch):
    """Shows each phase of a verb as a bar or as lines, one after the other."""

    def __init__(self, stack: contextlib.ExitStack, resumes: bool = False) -> None:
        self._stack, self._resumes = stack, resumes
        self._reports: dict[str, Report] = {}

    def phase(self, name: str, done: int, total: int) -> None:
        if name not in self._reports:
            self._stack.close()
            bar = progress(name, _UNITS.get(name, "samples"), resumes=self._resumes, begun=not self._resumes)
            self._reports[name] = self._stack.enter_context(bar)
        self._reports[name](done, total)

    def say(self, text: str) -> None:
        note(text)


@contextlib.contextmanager
def bars(resumes: bool = False) -> Iterator[Watch]:
    """A watch that shows each phase of a verb on stderr; `resumes` as in `progress`."""
    with contextlib.ExitStack() as stack:
        yield Bars(stack, resumes)


_UNITS = {
    "bench decode": "rounds",
    "bench gpu": "parts",
    "bench prefill": "prefills",
    "probe": "forwards",
    "probe of bits": "forwards",
    "trials": "trials",
    "finalists": "answers",
    "proof": "answers",
    "knobs": "scores",
    "rivals": "scores",
    "types": "types",
    "assemble": "steps",
    "evaluate": "steps",
    "compare": "answers",
    "knockout": "answers",
    "bench trace": "prefills",
    "bench tune": "steps",
    "side by side": "steps",
    "bench storage": "cases",
    "submissions": "files",
}
