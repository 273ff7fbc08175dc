"""Choosing the best tokens by score, with ties to the lower position."""

from __future__ import annotations

import torch
from torch import Tensor


def best(scores: Tensor, candidates: Tensor, counts: Tensor, positions: Tensor | None = None) -> Tensor:
    """Mark the `counts` best-scored candidates of each row.

    Args:
        scores: `[B, G, N]`.
        candidates: bool, broadcastable to `[B, G, N]`; others are never chosen.
        counts: `[B]` how many to choose in a row (at most its candidates are chosen).
        positions: `[B, G, N]` order among equal scores (lower first); default: the column.

    Returns:
        bool `[B, G, N]`.
    """
    ranked = scores.masked_fill(~candidates, float("-inf"))
    if positions is None:
        order = ranked.argsort(dim=-1, descending=True, stable=True)
    else:
        by_position = positions.argsort(dim=-1, stable=True)
        order = ranked.gather(-1, by_position).argsort(dim=-1, descending=True, stable=True)
        order = by_position.gather(-1, order)
    place = torch.arange(scores.shape[-1], device=scores.device)
    chosen = (place < counts[:, None, None]).expand_as(order)
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, chosen) & candidates
