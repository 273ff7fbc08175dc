"""The core: the vision tokens that every step attends to, picked anew at a refresh."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avlprof.attention.rows import group_mean
from avlprof.runtime.layout import CORE, STORED, RowPlan, exchange, exchange_counted, per_row, swaps


@dataclass(frozen=True)
class CoreSlots:
    """Where core and stored vision tokens lie in a layer's left part, the same until the next turn.

    `vision` and `core` are bool `[B, 1, n]` over its slots, `counts [B, 1, 1]` the sizes of the cores.
    """

    vision: Tensor
    core: Tensor
    counts: Tensor
    size: int
    exchanges: int
    even: bool

    @classmethod
    def of(cls, plans: list[RowPlan], classes: Tensor) -> CoreSlots:
        """Of the `classes [B, 1, n]` of the slots."""
        cores = [plan.core for plan in plans]
        return cls(
            vision=(classes == STORED) | (classes == CORE),
            core=classes == CORE,
            counts=per_row(cores, classes.device),
            size=max(cores),
            exchanges=max(min(plan.core, plan.vision - plan.core) for plan in plans),
            even=len(set(cores)) == 1,
        )

    def best(self, weights: Tensor, positions: Tensor, groups: int) -> Tensor:
        """The vision slots that should be the core, bool `[B, groups, n]`; ties go to the lower position.

        Args:
            weights: `[B, H, m]` attention of the step to the last `m` slots, all vision slots among them.
            positions: `[B, G, n]` logical, `G` being `groups` or more.
            groups: sets of tokens: 1, or one a KV head.
        """
        scores = group_mean(weights, groups)
        start = self.vision.shape[-1] - scores.shape[-1]
        # positive floats are ordered as their bits are, so score and position fit into one key
        keys = (scores.view(torch.int32).long() << 32) - positions[:, :groups, start:]
        keys = keys.masked_fill(~self.vision[..., start:], torch.iinfo(torch.int64).min)
        top = keys.topk(self.size, dim=-1, sorted=not self.even).indices + start
        chosen = torch.arange(self.size, device=top.device) < self.counts
        found = torch.zeros_like(self.vision).repeat(1, groups, 1)
        return found.scatter_(-1, top, chosen.expand_as(top))

    def exchange(self, new: Tensor, buffers: tuple[Tensor, ...], fixed: bool) -> None:
        """Make `new [B, groups, n]` the core: exchange slots of all buffers.

        `fixed`: exchange as many pairs as could be needed, so that the host need not ask how many.
        """
        if not fixed:
            exchange_counted(buffers, self.core, new)
            return
        first, second = swaps(self.core, new, self.exchanges)
        for buffer in buffers:
            exchange(buffer, first, second)
