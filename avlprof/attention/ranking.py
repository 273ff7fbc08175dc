"""Ranking tokens: the best by score, ties to the lower position, and scores that run while decoding.

Ties always go to the lower position; three functions see to that, for three situations:

- `best`: once a prompt or turn. Each row has a count and positions of its own, so it sorts; and so does
  `best_pairs`, by which heads get counts of their own.
- `best_slots`: at every refresh, on the device. How many slots are wanted at most is known on the
  host, so that shapes are fixed and nothing waits; slots are in no order, so score and position are
  packed into one key, and the largest keys are taken without a sort.
- `ranks`: forced scoring, where many policies ask for other counts of the same ranking. It ranks
  every token once, and each policy then takes what is below its count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def best(scores: Tensor, candidates: Tensor, counts: Tensor, positions: Tensor | None = None) -> Tensor:
    """Mark the `counts` best-scored candidates of each row.

    Args:
        scores: `[B, G, N]`.
        candidates: bool, broadcastable to `[B, G, N]`; others are never chosen.
        counts: `[B]` or `[B, G]`, how many to choose in a row (at most its candidates are chosen).
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
    rank = torch.arange(scores.shape[-1], device=scores.device)
    chosen = (rank < counts.view(len(counts), -1, 1)).expand_as(order)
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, chosen) & candidates


def best_pairs(scores: Tensor, candidates: Tensor, counts: Tensor, parts: Sequence[float]) -> Tensor:
    """Mark the best pairs of head and token of each row: counts differ by head, `counts` is their mean.

    Each head has `floor(part * count)` best tokens of its own for sure. Ties go to the lower column, then to
    the lower head. Source: AdaKV, arXiv 2407.11550 (a part of every head's budget is not touched).

    Args:
        scores: `[B, G, N]`, of one scale for all heads.
        candidates: bool, broadcastable to `[B, G, N]`; at most these are chosen.
        counts: `[B]`, so that `G` times as many pairs are chosen in a row.
        parts: of each head, over the mean count; their mean is 1 at most.

    Returns:
        bool `[B, G, N]`.
    """
    batch, groups, width = scores.shape
    sure = counts[:, None].double() * torch.tensor(parts, dtype=torch.double, device=scores.device)
    own = best(scores, candidates, (sure + 1e-6).long())
    ranked = scores.masked_fill(own, float("inf")).mT.reshape(batch, 1, -1)
    every = candidates.expand_as(scores).mT.reshape(batch, 1, -1)
    return best(ranked, every, counts * groups).view(batch, width, groups).mT


def best_slots(
    scores: Tensor, candidates: Tensor, counts: Tensor, positions: Tensor, most: int, even: bool
) -> Tensor:
    """Mark the `counts` best-scored slots of each row, without a wait for the device.

    Args:
        scores: fp32 `[B, G, n]`, not negative.
        candidates: bool `[B, 1, n]`; others come last.
        counts: int64 `[B, 1, 1]`, at most each row's candidates.
        positions: int64 `[B, G, n]` order among equal scores (lower first), below 2^32.
        most: the largest of the counts, known on the host.
        even: whether all counts are `most`, so that the order of the best is of no matter.

    Returns:
        bool `[B, G, n]`.
    """
    # floats that are not negative are ordered as their bits are, so score and position fit into one key
    keys = (scores.view(torch.int32).long() << 32) - positions
    keys = keys.masked_fill(~candidates, torch.iinfo(torch.int64).min)
    slots = keys.topk(most, dim=-1, sorted=not even).indices
    chosen = torch.arange(most, device=slots.device) < counts
    return torch.zeros_like(keys, dtype=torch.bool).scatter_(-1, slots, chosen.expand_as(slots))


def ranks(scores: Tensor) -> Tensor:
    """Rank of every entry in its row `[..., n]`, best 0; ties go to the lower index. int64."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, rank)


def averaged(before: Tensor, row: Tensor, seen: Tensor, memory: float) -> Tensor:
    """Running mean of the rows that saw a token, the newest first: fp32, of the shape of `before`.

    Args:
        before: the mean so far, below 0 where no row has seen the token yet.
        row: this row's attention weights; not read where it does not see.
        seen: bool, what the row sees: what it does not stays as it was.
        memory: what the mean so far counts, in [0, 1); the row counts the rest, and all of a first one.
    """
    now = torch.where(before < 0, row, memory * before + (1.0 - memory) * row)
    return torch.where(seen, now, before)


def core_scores(prompt: Tensor, mean: Tensor, vision: Tensor, share: float) -> Tensor:
    """What a refresh ranks by: `share` parts of the prompt's scores, the rest of the rows' running mean.

    Each of the two is made to sum to 1 over `vision`, bool `[..., n]`; scores below 0 count as 0, and so
    do all that are no vision. fp32 `[..., n]`, not negative.
    """
    if share == 0.0:
        return mean.clamp(min=0.0).masked_fill(~vision, 0.0)
    parts = (torch.where(vision, part, 0.0).clamp(min=0.0) for part in (prompt, mean))
    whole, own = (part / part.sum(dim=-1, keepdim=True).clamp(min=_NOTHING) for part in parts)
    return share * whole + (1.0 - share) * own


_NOTHING = 1e-30

KINDS = ("history", "accumulated", "last_query")


def quantile(weights: Tensor, present: Tensor, share: float) -> Tensor:
    """Quantile of the present entries of each row, linear between neighbours: `[..., n]` to `[..., 1]`.

    0 where a row has no present entry.
    """
    count = present.sum(dim=-1, keepdim=True)
    ordered = weights.masked_fill(~present, float("inf")).sort(dim=-1).values
    rank = (count - 1).clamp(min=0) * share
    low = rank.floor().long()
    high = torch.minimum(low + 1, (count - 1).clamp(min=0))
    first, second = ordered.gather(-1, low), ordered.gather(-1, high)
    value = first + (second - first) * (rank - low)
    return torch.where(count > 0, value, torch.zeros_like(value))


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
    kind: str, before: Tensor, row: Tensor, present: Tensor, newest: Tensor, deleted: float
) -> Tensor:
    """Scores after one decoding row: `[..., n]`.

    Args:
        kind: one of `KINDS`.
        before: `[..., n]` scores so far; not read at `newest` and at slots that are not `present`.
        row: `[..., n]` this row's attention weights.
        present: bool `[..., n]`, slots that hold a competing token, the newest included.
        newest: bool `[..., n]`, the slot of the row's own token.
        deleted: as in `prompt_scores`.
    """
    if kind == "last_query":
        return row
    before = before.masked_fill(newest | ~present, 0.0)
    if kind == "accumulated":
        return before + row
    return torch.where(newest, row, before + row - quantile(row, present, deleted))
