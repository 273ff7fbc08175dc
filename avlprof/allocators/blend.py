"""An allocator mixed with uniform."""

from __future__ import annotations

from dataclasses import dataclass

from avlprof.allocators._base import Allocator, Array, Evidence
from avlprof.errors import UserError


@dataclass(frozen=True)
class Blend(Allocator):
    """`mix` parts of another allocator and `1 - mix` parts of uniform.

    Source: EffiVLM-Bench, arXiv 2506.00479, where 20% adaptive and 80% uniform beat budgets that
    are adaptive throughout.
    """

    inner: Allocator
    mix: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 <= self.mix <= 1.0:
            raise UserError(f"mix must be in [0, 1], got {self.mix}; 0 is uniform, 1 all adaptive")

    def shares(self, evidence: Evidence, target: float) -> Array:
        adaptive = self.inner.shares(evidence, target)
        mean = adaptive.mean()
        relative = adaptive / mean if mean > 0 else adaptive + 1.0
        blended: Array = self.mix * relative + (1.0 - self.mix)
        return blended
