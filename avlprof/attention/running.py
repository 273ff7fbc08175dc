"""Running scores of tokens that compete while decoding, as pure functions.

Every processed row of attention changes the score of the tokens that it looked at. Three ways:

- `history`: A-VL's, arXiv 2409.14846: a token starts with its own diagonal weight; each later row
  adds its weight less a quantile of the row, so that a token below the quantile sinks.
- `accumulated`: H2O's, arXiv 2306.14048: weights add up.
- `last_query`: TOVA's, arXiv 2401.06104: the newest row alone counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("history", "accumulated", "last_query")


def quantile(weights: Tensor, present: Tensor, share: float) -> Tensor:
    """Quantile of the present entries of each row, linear between neighbours: `[..., n]` to `[..., 1]`.

    0 where a row has no present entry.
    """
    count = present.sum(dim=-1, keepdim=True)
    ordered = weights.masked_fill(~present, float("inf")).sort(dim=-1).values
    place = (count - 1).clamp(min=0) * share
    low = place.floor().long()
    high = torch.minimum(low + 1, (count - 1).clamp(min=0))
    first, second = ordered.gather(-1, low), ordered.gather(-1, high)
    found = first + (second - first) * (place - low)
    return torch.where(count > 0, found, torch.zeros_like(found))


def prompt_scores(kind: str, weights: Tensor, deleted: float, start: int = 0) -> Tensor:
    """What rows of a prompt give to its tokens' scores: all rows at once, or a block of them.

    Blocks add up, except for `last_query`, where the last block is the score.

    Args:
        kind: one of `KINDS`.
        weights: `[..., R, T]` attention of the rows of tokens `start`, `start + 1`, ... to all `T`
            tokens; what a row gives to later tokens does not count, and rows need not sum to 1,
            since other columns are left out.
        deleted: share of the tokens that goes, the quantile of `history`.
        start: index of the first row among the tokens.

    Returns:
        `[..., T]`.
    """
    rows, total = weights.shape[-2:]
    if kind == "last_query":
        return weights[..., -1, :]
    past = torch.ones(rows, total, dtype=torch.bool, device=weights.device).tril(start)
    if kind == "accumulated":
        return (weights * past).sum(dim=-2)
    older = past.tril(start - 1).expand_as(weights)
    gained = ((weights - quantile(weights, older, deleted)) * older).sum(dim=-2)
    return gained + (weights * (past & ~older)).sum(dim=-2)


def step_scores(
    kind: str, held: Tensor, row: Tensor, present: Tensor, newest: Tensor, deleted: float
) -> Tensor:
    """Scores after one decoding row: `[..., n]`.

    Args:
        kind: one of `KINDS`.
        held: `[..., n]` scores so far; not read at `newest` and at slots that are not `present`.
        row: `[..., n]` this row's attention weights.
        present: bool `[..., n]`, slots that hold a competing token, the newest included.
        newest: bool `[..., n]`, the slot of the row's own token.
        deleted: as in `prompt_scores`.
    """
    if kind == "last_query":
        return row
    before = held.masked_fill(newest | ~present, 0.0)
    if kind == "accumulated":
        return before + row
    return torch.where(newest, row, before + row - quantile(row, present, deleted))
