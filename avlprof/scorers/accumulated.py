"""H2O's score: attention that a token received from all rows of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avlprof.scorers.scorer import Prefill, Scorer


@dataclass(frozen=True)
class Accumulated(Scorer):
    """Column sums of the prompt's attention matrix, in blocks of `block` rows.

    Source: H2O, arXiv 2306.14048. Memory is linear in the prompt's length.
    """

    block: int = 128

    def score(self, prefill: Prefill) -> Tensor:
        length = prefill.query.shape[2]
        total = prefill.query.new_zeros((*prefill.query.shape[:2], length), dtype=torch.float32)
        for start in range(0, length, self.block):
            rows = torch.arange(start, min(start + self.block, length), device=total.device)
            rows = rows.expand(total.shape[0], -1)
            counted = prefill.valid.gather(1, rows)[:, None, :, None]
            total += (prefill.weights(rows) * counted).sum(dim=2)
        return total
