"""A token's score is the attention of all text behind the pictures."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from avlprof.scorers._base import Prefill, Scorer, at_least_one


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
        rows, counted = prefill.text_rows(self.rows)
        return prefill.received(rows, counted[:, 0, :, 0]) / counted.sum(dim=2).clamp(min=1)
