"""Another scorer's score, spread over neighbouring tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from avlprof.errors import UserError
from avlprof.scorers._base import Prefill, Scorer, scorer_over


@dataclass(frozen=True)
class Pooled(Scorer):
    """The score of scorer `of`, which must not be negative, pooled over `kernel` positions.

    Neighbours of a chosen token are then chosen with it. `mode` is `mean` or `max`.

    Source: the clustering by pooling of SnapKV, arXiv 2404.14469, whose code has a kernel of 5 and
    means; positions beyond the prompt count as 0 there and here.
    """

    of: str = "window"
    kernel: int = 5
    mode: str = "mean"

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"kernel of scorer 'pooled' must be odd and above 0, got {self.kernel}")
        if self.mode not in ("mean", "max"):
            raise UserError(f"mode of scorer 'pooled' must be mean or max, got {self.mode}")
        scorer_over("pooled", self.of)

    def score(self, prefill: Prefill) -> Tensor:
        scores = scorer_over("pooled", self.of).score(prefill) * prefill.valid[:, None]
        pool = F.avg_pool1d if self.mode == "mean" else F.max_pool1d
        pooled: Tensor = pool(scores, self.kernel, stride=1, padding=self.kernel // 2)
        return pooled
