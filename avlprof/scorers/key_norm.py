"""Knorm's score: keys of small norm are attended to most."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from avlprof.scorers._base import Prefill, Scorer


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """Negative L2 norm of the key; needs no queries.

    Source: Knorm, arXiv 2406.11430.
    """

    def score(self, prefill: Prefill) -> Tensor:
        norm: Tensor = prefill.key.float().norm(dim=-1)
        return -norm.repeat_interleave(prefill.query.shape[1] // prefill.key.shape[1], dim=1)
