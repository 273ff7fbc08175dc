"""Layers that look at vision much, and at few of its tokens most, keep many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from avlprof.allocators._base import Allocator, Array, Evidence
from avlprof.errors import UserError


@dataclass(frozen=True)
class Strength(Allocator):
    """The mean of two shares: by attention on vision (strength) and by skewness of the token scores.

    Each is scaled to a mean of 1 over layers first. A negative skewness counts as 0.

    Source: AirCache, arXiv 2503.23956, which allots by "the strength and skewness of token
    importance distribution". Its equations could not be read, and no code of it was found: how it
    scales the two and weighs them is unknown here, and equal halves are this project's reading.
    There the scores are those of an "elite" window (the text tokens that the last one attends to
    most), on every prompt; here of all text rows of a prompt, or of decoding steps, averaged over
    heads and samples. Note that it gives *more* to layers whose attention is concentrated,
    contrary to `coverage`, `sparsity` and `entropy`.
    """

    def shares(self, evidence: Evidence, target: float) -> Array:
        if evidence.vision_mass is None or evidence.skewness is None:
            raise UserError(
                "allocator 'strength' needs the attention on vision of a profile and its skewness; "
                "analyze a run first or use allocator 'uniform'"
            )
        parts = (evidence.vision_mass, np.maximum(evidence.skewness, 0.0))
        return (_scaled(parts[0]) + _scaled(parts[1])) / 2


def _scaled(values: Array) -> Array:
    """Values at a mean of 1; ones if all are zero."""
    mean = values.mean()
    return values / mean if mean > 0 else np.ones_like(values)
