"""An allocator made sharper or flatter."""

from __future__ import annotations

from dataclasses import dataclass

from avlprof.allocators._base import Allocator, Array, Evidence
from avlprof.errors import UserError


@dataclass(frozen=True)
class Sharp(Allocator):
    """Shares of another allocator to the power `temperature`: above 1 layers differ more, below less.

    Source: this project; a knob of the search, like a temperature's reciprocal in a softmax over
    the logarithms of the shares.
    """

    inner: Allocator
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0.0:
            raise UserError(f"temperature must be above 0, got {self.temperature}; 1 changes nothing")

    def shares(self, evidence: Evidence, target: float) -> Array:
        powered: Array = self.inner.shares(evidence, target) ** self.temperature
        return powered
