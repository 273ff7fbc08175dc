"""The mandatory baseline: tokens drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avlprof.scorers._base import Prefill, Scorer

_MIX = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)


@dataclass(frozen=True)
class Random(Scorer):
    """A hash of seed, layer and index among the row's tokens, uniform in [0, 1).

    A function of the row alone: the same in any batch, on any device, and under any padding.
    All heads share a draw. Evaluate several seeds to judge chance.
    """

    seed: int = 0

    def score(self, prefill: Prefill) -> Tensor:
        index = prefill.valid.long().cumsum(dim=1)
        mixed = index * _MIX[0] + prefill.layer * _MIX[1] + (self.seed + 1) * _MIX[2]
        for shift in (15, 13, 16):
            mixed = ((mixed ^ (mixed >> shift)) * _MIX[1]) & 0xFFFFFFFF
        mixed = mixed ^ (mixed >> 16)
        scores = (mixed & 0xFFFFFF).to(torch.float32) / float(1 << 24)
        return scores[:, None, :].expand(-1, prefill.query.shape[1], -1)
