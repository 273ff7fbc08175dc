"""A policy over known answers in one forward: what tuning and fidelity score by."""

from avlprof.runtime.forced.batch import ForcedBatch
from avlprof.runtime.forced.samples import ForcedSet
from avlprof.runtime.forced.score import ForcedScore
from avlprof.runtime.forced.stepped import SteppedBatch

__all__ = ["ForcedBatch", "ForcedScore", "ForcedSet", "SteppedBatch"]
