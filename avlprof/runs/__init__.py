"""The run directory: write, resume, read. No torch."""

from avlprof.runs.directory import RunDirectory, RunWriter
from avlprof.runs.meta import RunMeta
from avlprof.runs.shard import Shard

__all__ = ["RunDirectory", "RunMeta", "RunWriter", "Shard"]
