"""A token's score is the norm of what it would contribute."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from avlprof.scorers._base import Prefill, Scorer


@dataclass(frozen=True)
class ValueNorm(Scorer):
    """L2 norm of the value vector.

    Source: the value-aware scores of VATP, arXiv 2406.12335, without its attention factor.
    """

    def score(self, prefill: Prefill) -> Tensor:
        norm: Tensor = prefill.value.float().norm(dim=-1)
        return norm.repeat_interleave(prefill.query.shape[1] // prefill.key.shape[1], dim=1)
