"""The core: the vision tokens that every step attends to, picked anew at a refresh."""

from __future__ import annotations

import torch
from torch import Tensor

from avlprof.attention.rows import group_mean
from avlprof.attention.selection import best
from avlprof.runtime.layout import CORE, STORED, RowPlan, exchange, per_row, swaps


def pick_core(
    weights: Tensor, classes: Tensor, positions: Tensor, plans: list[RowPlan], groups: int, fixed: bool
) -> tuple[Tensor, Tensor]:
    """Slot pairs `[B, groups, m]` to exchange, so that the best vision tokens are the core.

    Args:
        weights: `[B, H, n]` attention of the step to the left part's slots.
        classes: `[B, 1, n]` of the slots.
        positions: `[B, G, n]` logical, `G` being `groups` or more; ties go to the lower one.
        plans: of the rows, for the number of tokens in the core.
        groups: sets of tokens: 1, or one a KV head.
        fixed: exchange as many pairs as could be needed, so that the host need not ask how many.
    """
    scores = group_mean(weights, groups)
    old = classes.expand_as(scores)
    vision = (old == STORED) | (old == CORE)
    counts = per_row([plan.core for plan in plans], scores.device)[:, 0, 0]
    core = best(scores, vision, counts, positions[:, :groups])
    new = torch.where(vision, torch.where(core, CORE, STORED), old)
    most = max(min(plan.core, plan.vision - plan.core) for plan in plans) if fixed else None
    return swaps(old, new, most)


def exchange_all(buffers: tuple[Tensor, ...], pairs: tuple[Tensor, Tensor], start: int) -> None:
    """Exchange pairs of slots, counted from `start`, in all buffers."""
    first, second = pairs
    if first.shape[-1]:
        for buffer in buffers:
            exchange(buffer, first + start, second + start)
