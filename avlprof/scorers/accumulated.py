"""H2O's score: attention that a token received from all rows of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avlprof.attention.column_sums import Seen, column_sums
from avlprof.scorers._base import Prefill, Scorer


@dataclass(frozen=True)
class Accumulated(Scorer):
    """Column sums of the prompt's attention matrix, `block` rows at a time (0: as suits the device).

    Source: H2O, arXiv 2306.14048. Memory is linear in the prompt's length.
    """

    block: int = 0

    def score(self, prefill: Prefill) -> Tensor:
        if prefill.past:
            return self._turn(prefill)
        return column_sums(
            prefill.query,
            prefill.key,
            prefill.scaling,
            Seen(valid=prefill.valid, causal=prefill.causal, mask=prefill.mask),
            counted=prefill.valid,
            softcap=prefill.softcap,
            sinks=prefill.sinks,
            block=self.block or None,
        )

    def _turn(self, prefill: Prefill) -> Tensor:
        """A further turn: its rows attend to tokens held before too, which `weights` accounts for."""
        length, block = prefill.query.shape[2], self.block or 128
        total = prefill.query.new_zeros((*prefill.query.shape[:2], length), dtype=torch.float32)
        for start in range(0, length, block):
            rows = torch.arange(start, min(start + block, length), device=total.device)
            rows = rows.expand(total.shape[0], -1)
            counted = prefill.valid.gather(1, rows)[:, None, :, None]
            total += (prefill.weights(rows) * counted).sum(dim=2)
        return total
