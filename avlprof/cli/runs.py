"""Which run a command works on when none is named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from avlprof.cli._output import note
from avlprof.cli._progress import progress

if TYPE_CHECKING:
    from avlprof.run import Run


def run_or_newest(path: Path | None) -> Run:
    """The run at `path`; else the newest one below `runs/`; else one of the embedded model, made now."""
    from avlprof.run import RUNS, Run, latest_run

    if path is not None:
        return Run.open(path)
    newest = latest_run()
    if newest is not None:
        note(f"run {newest.path} (the newest below {RUNS}/)")
        return newest
    from avlprof.api.trace import trace

    note(f"no run below {RUNS}/; tracing the embedded model first")
    with progress("trace", resumes=True) as report:
        return trace(progress=report)
