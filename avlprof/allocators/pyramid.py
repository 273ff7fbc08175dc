"""Early layers keep much, late ones little, in a straight line."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from avlprof.allocators._base import Allocator, Array, Evidence
from avlprof.errors import UserError


@dataclass(frozen=True)
class Pyramid(Allocator):
    """Shares that fall linearly from the first layer to the last.

    The last layer keeps `1 / beta` of the mean. Where the first would keep more than all its
    tokens the line is made flatter, not cut.

    Source: PyramidKV, arXiv 2406.02069, checked against the authors' code (`beta` is 20 there, and
    the flatter line is theirs). It counts beside an observation window, and gives every layer the
    same where a prompt is shorter than twice the mean, at targets over a half.
    """

    beta: float = 20.0

    def __post_init__(self) -> None:
        if not self.beta >= 1.0:
            raise UserError(f"option beta of allocator 'pyramid' must be 1 or more, got {self.beta}")

    def shares(self, evidence: Evidence, target: float) -> Array:
        first = min(2 * target - target / self.beta, 1.0)
        return np.linspace(first, 2 * target - first, evidence.layers)
