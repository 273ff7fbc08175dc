"""Every layer keeps the same share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from avlprof.allocators._base import Allocator, Array, Evidence


@dataclass(frozen=True)
class Uniform(Allocator):
    """The same share for every layer.

    Source: the single global ratio of A-VL, arXiv 2409.14846, and of H2O, SnapKV and FastV.
    """

    def shares(self, evidence: Evidence, target: float) -> Array:
        return np.ones(evidence.layers)
