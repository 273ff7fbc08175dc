"""Another scorer's score times what the token would contribute."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from avlprof.scorers._base import Prefill, Scorer, scorer_over


@dataclass(frozen=True)
class Valued(Scorer):
    """The score of scorer `of`, which must not be negative, times the L2 norm of the value.

    Source: VATP, arXiv 2406.12335, with `of: accumulated`; there the L1 norm.
    """

    of: str = "last_query"

    def __post_init__(self) -> None:
        scorer_over("valued", self.of)

    def score(self, prefill: Prefill) -> Tensor:
        norm: Tensor = prefill.value.float().norm(dim=-1)
        heads = prefill.query.shape[1] // prefill.value.shape[1]
        return scorer_over("valued", self.of).score(prefill) * norm.repeat_interleave(heads, dim=1)
