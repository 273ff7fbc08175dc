"""SnapKV's score: attention of the newest rows of the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avlprof.scorers._base import Prefill, Scorer, at_least_one


@dataclass(frozen=True)
class Window(Scorer):
    """Mean attention of the newest `rows` prompt rows, of whatever modality.

    Source: the observation window of SnapKV, arXiv 2404.14469, before its pooling (see `pooled`).
    """

    rows: int = 32

    def __post_init__(self) -> None:
        at_least_one(self, "rows")

    def score(self, prefill: Prefill) -> Tensor:
        length = prefill.modality.shape[1]
        newest = torch.arange(max(length - self.rows, 0), length, device=prefill.query.device)
        rows = newest.expand(prefill.modality.shape[0], -1)
        counted = prefill.valid.gather(1, rows)
        return prefill.received(rows, counted) / counted.sum(dim=1).clamp(min=1)[:, None, None]
