"""What starts further worker processes: this machine, a Ray cluster, or SLURM by submitit."""

from __future__ import annotations

from avlprof.launchers._base import NUMBER, WORKER, Job, Launcher, Started, orphaned
from avlprof.launchers.crew import LAUNCHERS, Crew, Launch

__all__ = ["LAUNCHERS", "NUMBER", "WORKER", "Crew", "Job", "Launch", "Launcher", "Started", "orphaned"]
