"""The run directory: write, resume, read. No torch."""

from avlprof.runs.directory import RunDirectory, RunWriter
from avlprof.runs.meta import RunMeta

__all__ = ["RunDirectory", "RunMeta", "RunWriter"]
