"""An allocator asked about the layers that policies act on, and about no others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from avlprof.allocators._base import Allocator, Array, Evidence


@dataclass(frozen=True)
class Governed(Allocator):
    """Another allocator over the governed layers alone; the others get a share of 0.

    Rules that go by depth then count the governed layers, and a mean is theirs.

    Source: this project; for models whose other layers keep a window or a state.
    """

    inner: Allocator

    def shares(self, evidence: Evidence, target: float) -> Array:
        if evidence.governed is None:
            return self.inner.shares(evidence, target)
        shares = np.zeros(evidence.layers)
        shares[list(evidence.governed)] = self.inner.shares(evidence.of_governed(), target)
        return shares
