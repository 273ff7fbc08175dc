"""A token's score is the attention of all text behind the pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avlprof.attention.modality import Modality
from avlprof.scorers.scorer import Prefill, Scorer, at_least_one


@dataclass(frozen=True)
class Instruction(Scorer):
    """Mean attention of the newest `rows` text rows, system rows where a prompt has no text.

    Source: the post-vision scoring of VL-Cache, arXiv 2410.23317, and SnapKV's observation
    window, arXiv 2404.14469, here bounded by the question.
    """

    rows: int = 64

    def __post_init__(self) -> None:
        at_least_one(self, "rows")

    def score(self, prefill: Prefill) -> Tensor:
        text = prefill.modality == Modality.TEXT
        asked = torch.where(text.any(dim=1, keepdim=True), text, prefill.valid)
        order = asked.long().argsort(dim=1, stable=True)[:, -self.rows :]
        counted = asked.gather(1, order)[:, None, :, None]
        weights = prefill.weights(order) * counted
        return weights.sum(dim=2) / counted.sum(dim=2).clamp(min=1)
