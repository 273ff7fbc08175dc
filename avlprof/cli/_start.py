"""Before anything heavy is imported: threads that do not spin, and a first sign of life."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

import typer

from avlprof.models.tiny import FOLDERS

OWN_THREADS: Final = "AVLPROF_THREADS"
"""Set beside `OMP_NUM_THREADS` where this command line chose it, so that workers choose again."""

_WAITING: Final = {"KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
_MODEL: Final = ("trace", "run", "tune", "evaluate", "compare", "demo")
"""Commands that load a model, by default the embedded one."""
_EMBEDDED: Final = ("tiny", "tiny-mrope")
_HEAVY: Final = (*_MODEL, "analyze", "report", "derive", "bench", "studies", "export")


def prepare(words: Sequence[str]) -> None:
    """Set what torch reads when it is imported, as far as the user has not; and say that work begins.

    OpenMP's threads spin while they wait for each other, which beside busy neighbours costs many
    times the work itself.
    """
    command = next((word for word in words if not word.startswith("-")), "")
    for name, value in _WAITING.items():
        os.environ.setdefault(name, value)
    if command in _MODEL and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(1 if _embedded(words) else free_cores())
        os.environ[OWN_THREADS] = "1"
    asked = {"-h", "--help"} & set(words)
    if command in _HEAVY and not asked and len(words) > 0 and sys.stderr.isatty():
        typer.echo(f"avlprof {command}: starting ...", err=True)


def free_cores() -> int:
    """Cores of this process that others leave free, at least one."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    try:
        busy = os.getloadavg()[0]
    except (OSError, AttributeError):
        busy = 0.0
    return max(cores - round(busy), 1)


def _embedded(words: Sequence[str]) -> bool:
    """Whether the model is an embedded one, for which a second thread costs more than it does."""
    for index, word in enumerate(words):
        if word in ("--model", "-m"):
            return "".join(words[index + 1 : index + 2]) in FOLDERS
        if word.startswith("--model="):
            return word.removeprefix("--model=") in FOLDERS
        if word.startswith("-m") and not word.startswith("--"):
            return word.removeprefix("-m") in FOLDERS
    return True
