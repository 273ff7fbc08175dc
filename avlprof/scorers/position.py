"""StreamingLLM's score: newer tokens are better."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avlprof.scorers._base import Prefill, Scorer


@dataclass(frozen=True)
class Position(Scorer):
    """The position itself, so the newest tokens are kept (sinks are a policy's own field).

    Source: StreamingLLM, arXiv 2309.17453.
    """

    def score(self, prefill: Prefill) -> Tensor:
        batch, heads, length, _ = prefill.query.shape
        positions = torch.arange(length, device=prefill.query.device, dtype=torch.float32)
        return positions.expand(batch, heads, length)
