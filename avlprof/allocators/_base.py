"""What an allocator is: a rule that spreads a mean kept share over layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Evidence:
    """What an allocator may look at. Allocators that look at nothing take it with `layers` alone.

    Attributes:
        layers: number of decoder layers.
        tokens: vision tokens `N` of a typical prompt.
        coverage: `[layers, N]`; entry `[l, k - 1]` is the share of layer l's vision attention
            that its best k tokens hold, mean over samples. Rows never fall and end at 1.
        vision_mass: `[layers]` share of a row's attention that goes to vision.
        entropy: `[layers]` entropy in nat of how that attention is spread over the vision tokens.
        sparsity: `[layers]` share of the vision tokens whose score is below 1% of the largest.
        skewness: `[layers]` of the scores of the vision tokens; may be negative.
        damage: `[layers, levels]` measured cost (KL to dense, nat per token) of keeping only the
            share `damage_levels [levels]` of vision tokens in one layer and all in the others.
        bit_damage: `[layers, numbers]` measured cost of storing all vision tokens of one layer in as few
            bits as `bit_levels [numbers]` says, and all others in full.
        overlap: `[layers, layers]` share of one layer's best vision tokens of a decoding step that are
            another layer's at that step too; 1 on the diagonal.
        governed: the layers that policies act on, where there are others too; None means all. What
            arrays say of others means nothing.
    """

    layers: int
    tokens: int
    coverage: Array | None = None
    vision_mass: Array | None = None
    entropy: Array | None = None
    sparsity: Array | None = None
    skewness: Array | None = None
    damage: Array | None = None
    damage_levels: Array | None = None
    bit_damage: Array | None = None
    bit_levels: Array | None = None
    overlap: Array | None = None
    governed: tuple[int, ...] | None = None

    def of_governed(self) -> Evidence:
        """The same of the layers that policies act on alone, as if the model had no others."""
        if self.governed is None:
            return self
        own = list(self.governed)
        arrays = {name: getattr(self, name) for name in _BY_LAYER}
        few: dict[str, Any] = {name: None if array is None else array[own] for name, array in arrays.items()}
        few["overlap"] = None if self.overlap is None else self.overlap[np.ix_(own, own)]
        return replace(self, layers=len(own), governed=None, **few)


_BY_LAYER = ("coverage", "vision_mass", "entropy", "sparsity", "skewness", "damage", "bit_damage")


class Allocator(ABC):
    """Spreads a mean kept share of vision tokens over the layers.

    `shares` is called once for each budget. Its result counts up to a common factor:
    `fit_keep` scales it to the budget, within [floor, 1], and turns it into token counts. A
    layer's kept share must not fall when the target rises.
    """

    @abstractmethod
    def shares(self, evidence: Evidence, target: float) -> Array:
        """Relative kept shares `[layers]`, finite and not negative, at a mean of `target` in [0, 1].

        Raises `UserError` when the evidence lacks what this allocator needs.
        """
