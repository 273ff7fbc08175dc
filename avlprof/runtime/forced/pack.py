"""Answers of a batch as one sequence without padding, for several policies at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AnswerGroup:
    """Answers of similar length: `rows` of the batch in the order of lengths.

    `tokens [b, T]` are all but an answer's last token, `targets [b, T]` all but its first; `real
    [b, T]` marks what is not padding.
    """

    rows: slice
    tokens: Tensor
    targets: Tensor
    real: Tensor

    @classmethod
    def of(cls, rows: range, answers: Sequence[Sequence[int]], device: torch.device) -> AnswerGroup:
        """The group of the answers `rows` of a batch, each of 2 or more tokens."""
        width = max(len(answer) for answer in answers)
        padded = torch.tensor([[*answer, *[0] * (width - len(answer))] for answer in answers], device=device)
        lengths = torch.tensor([len(answer) for answer in answers], device=device)
        real = torch.arange(1, width, device=device) < lengths[:, None]
        return cls(slice(rows.start, rows.stop), padded[:, :-1], padded[:, 1:], real)


@dataclass(frozen=True)
class Packed:
    """Where the rows of groups lie in one sequence of `R * P` tokens.

    `places` has `[b * P, T]` a group, the place of each token (any where it is padding) with the P
    policies of a row side by side, and `real` which are no padding. `order [P, R]` is the place of every
    token of every policy, group by group and row by row.
    """

    places: list[Tensor]
    real: list[Tensor]
    order: Tensor
    policies: int

    @classmethod
    def of(cls, groups: Sequence[AnswerGroup], policies: int) -> Packed:
        """Lay out groups for a number of policies."""
        places, reals, order, begin = [], [], [], 0
        for group in groups:
            real = spread(group.real, policies)
            place = (begin - 1 + real.flatten().cumsum(0)).view_as(real).masked_fill(~real, begin)
            begin += int(group.real.sum()) * policies
            places.append(place)
            reals.append(real)
            order.append(place.view(-1, policies, place.shape[1]).transpose(0, 1)[:, group.real])
        return cls(places, reals, torch.cat(order, dim=1), policies)

    def packed(self, values: Sequence[Tensor]) -> Tensor:
        """One sequence `[..., R * P]` of values `[..., b, T]` a group, repeated for each policy."""
        return torch.cat(
            [spread(v, self.policies)[..., real] for v, real in zip(values, self.real, strict=True)], dim=-1
        )


def spread(values: Tensor, policies: int) -> Tensor:
    """`[..., b, T]` to `[..., b * P, T]`, the copies of a row side by side."""
    return values.repeat_interleave(policies, dim=-2)
