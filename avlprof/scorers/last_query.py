"""A-VL's vision score: the attention row of the last prompt token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from avlprof.scorers._base import Prefill, Scorer


@dataclass(frozen=True)
class LastQuery(Scorer):
    """Softmax attention of the last prompt token over all keys.

    Source: A-VL, arXiv 2409.14846.
    """

    def score(self, prefill: Prefill) -> Tensor:
        last = prefill.last_row[:, None]
        return prefill.received(last, last >= 0)
