"""Shares fall with depth along a logistic curve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from avlprof.allocators._base import Allocator, Array, Evidence
from avlprof.errors import UserError


@dataclass(frozen=True)
class Sigmoid(Allocator):
    """`1 / (1 + exp(steepness * (depth - midpoint)))`, depth from 0 (first layer) to 1 (last).

    Early layers keep much and late ones little, with the fall around `midpoint`; steepness 0 is
    uniform, a large one a step. Scaled to the target, layers may reach all of their tokens.

    Source: P-Sigmoid of G-Search, arXiv 2412.00556: "a parametric sigmoid function" over layers,
    whose parameters its authors fit by Bayesian optimisation. Its equation could not be read, so
    the parameters are this project's. There vision tokens leave the hidden states, so a layer can
    keep none that an earlier one dropped; here each layer evicts its own KV. Depth is scaled to
    [0, 1], so that one setting serves models of any number of layers.
    """

    midpoint: float = 0.5
    steepness: float = 10.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.midpoint <= 1.0:
            raise UserError(f"option midpoint of allocator 'sigmoid' must be in [0, 1], got {self.midpoint}")
        if not 0.0 <= self.steepness < np.inf:
            raise UserError(
                f"option steepness of allocator 'sigmoid' must be 0 or more and finite, got {self.steepness}"
            )

    def shares(self, evidence: Evidence, target: float) -> Array:
        depth = np.linspace(0.0, 1.0, evidence.layers) if evidence.layers > 1 else np.zeros(1)
        # the logistic function as a tanh, which does not overflow
        shares: Array = 0.5 - 0.5 * np.tanh(self.steepness * (depth - self.midpoint) / 2)
        return shares
