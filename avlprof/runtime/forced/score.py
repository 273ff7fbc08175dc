"""How far a policy's next tokens are from the dense model's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avlprof.runtime.forced.head import Head

_LOGITS = 1 << 24  # numbers of logits that exist at a time


@dataclass(frozen=True)
class ForcedScore:
    """How close a policy stays to the dense model on one sample's answer.

    Means over the answer's `tokens`, the first included, which the prompt's last row gives: `kl` is
    the Kullback-Leibler divergence from dense to policy in nat, `agreement` the share of tokens at
    which both have the same best one, `log_likelihood` the log-probability of the answer in nat.
    """

    sample: str
    kl: float
    agreement: float
    log_likelihood: float
    tokens: int

    @classmethod
    def mean(cls, sample: str, tokens: int, sums: tuple[float, float, float]) -> ForcedScore:
        """From sums over the tokens, in the order of `closeness`; no token is a perfect score."""
        kl, agree, likelihood = (value / max(tokens, 1) for value in sums)
        return cls(sample, max(kl, 0.0), agree if tokens else 1.0, likelihood, tokens)


def closeness(head: Head, dense: Tensor, ours: Tensor, targets: Tensor) -> Tensor:
    """KL from dense to policy, agreement and log-probability of the target, `[3, P, R]`.

    Logits are formed block by block, so memory does not grow with tokens times vocabulary.

    Args:
        head: turns last hidden states into logits.
        dense: `[R, D]`, the dense model's.
        ours: `[P, R, D]`, those of P policies at the same tokens.
        targets: `[R]` the token that follows each of them.
    """
    found = dense.new_zeros((3, *ours.shape[:2]), dtype=torch.float32)
    size = max(_LOGITS // (head.vocabulary * (ours.shape[0] + 1)), 1)
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        wanted = head.logits(dense[part]).log_softmax(dim=-1)
        given = head.logits(ours[:, part]).log_softmax(dim=-1)
        index = targets[part].expand(ours.shape[0], -1)[..., None]
        found[0, :, part] = (wanted.exp() * (wanted - given)).sum(dim=-1)
        found[1, :, part] = (given.argmax(dim=-1) == wanted.argmax(dim=-1)).float()
        found[2, :, part] = given.gather(-1, index)[..., 0]
    return found
