"""Another scorer's score times how unlike the other keys a key is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from avlprof.errors import UserError
from avlprof.scorers._base import Prefill, Scorer, scorer_over
from avlprof.scorers.key_diversity import KeyDiversity

_SIGNED = ("key_norm", "key_diversity")  # whose scores are below 0
_POWER = 16.0


@dataclass(frozen=True)
class Distinct(Scorer):
    """The score of scorer `of` times `(1 - c) ** power`, `c` the cosine of a key with the mean vision key.

    Attention ranks by what is asked for; of tokens that are asked for alike, those that say the same as the
    rest of the picture go first. `power` 0 leaves the score as it is.

    Source: ours, of KeyDiff's measure (`key_diversity`, arXiv 2504.15364); relevance weighed against
    redundancy goes back to maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998).
    """

    of: str = "valued:instruction"
    power: float = 2.0

    def __post_init__(self) -> None:
        if self.of.rpartition(":")[2] in _SIGNED:
            raise UserError(f"scorer 'distinct' takes scores of 0 and more, got of: {self.of}")
        if not 0.0 <= self.power <= _POWER:
            raise UserError(f"power of scorer 'distinct' must be in [0, {_POWER:g}], got {self.power}")
        scorer_over("distinct", self.of)

    def score(self, prefill: Prefill) -> Tensor:
        unlike = (1.0 + KeyDiversity().score(prefill)).clamp(min=0.0)
        score: Tensor = scorer_over("distinct", self.of).score(prefill) * unlike**self.power
        return score
