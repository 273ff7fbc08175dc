"""Which tokens stay in a layer, which vision tokens form its core, and which go."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from avlprof.attention.modality import Modality
from avlprof.attention.ranking import best
from avlprof.attention.weights import group_mean
from avlprof.runtime.layout import (
    CORE,
    PADDING,
    STORED,
    TEXT,
    RowPlan,
    exchange,
    exchange_counted,
    per_row,
    swaps,
)
from avlprof.runtime.text_part import TextPart
from avlprof.runtime.turns import Turn, text_scores


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


def vision_classes(
    turn: Turn, scores: Tensor, old: Tensor, places: Tensor, kept: list[int], cores: list[int]
) -> Tensor:
    """STORED, CORE or else PADDING for each held and new token, `[B, G, n + N]`.

    What is held stays; of the new vision tokens the best stay, and the core is picked among all.

    Args:
        turn: the new tokens.
        scores: `[B, G, N]` of the new tokens.
        old: `[B, 1, n]` classes of the held slots.
        places: `[B, G, n + N]` logical positions.
        kept: new vision tokens that each row keeps.
        cores: each row's core after the turn.
    """
    groups, device = scores.shape[1], scores.device
    vision = (turn.modality == Modality.VISION)[:, None].expand_as(scores)
    new = best(scores, vision, per_row(kept, device)[:, 0, 0])
    was = ((old == STORED) | (old == CORE)).expand(-1, groups, -1)
    stays = torch.cat([was, new], dim=-1)
    if turn.held:
        scores = group_mean(turn.all_weights(turn.last_row[:, None])[:, :, 0], groups)
    core = best(scores, stays, per_row(cores, device)[:, 0, 0], places)
    return torch.where(core, CORE, torch.where(stays, STORED, PADDING))


def text_choice(
    turn: Turn, scores: Tensor, old: Tensor, places: Tensor, part: TextPart, plans: list[RowPlan], left: int
) -> tuple[Tensor, list[int], Tensor | None]:
    """Which tokens stay as text, bool `[B, G, n + N]`; how many in each row; the running scores of all.

    Args:
        turn: the new tokens.
        scores: `[B, G, N]` of the new tokens by the policy's scorer, for a joint pool.
        old: `[B, 1, n]` classes of the held slots, whose text begins at `left`.
        places: `[B, G, n + N]` logical positions.
        part: the text part before the turn; it counts the turn's tokens.
        plans: what each row keeps of the new tokens.
    """
    rule, groups, joint = part.rule, scores.shape[1], part.rule.policy.joint
    new = (turn.modality == Modality.TEXT)[:, None]
    was = (old == TEXT).expand(-1, groups, -1)
    candidates = torch.cat([was, new.expand(-1, groups, -1)], dim=-1)
    running = None
    if rule.running is not None and (joint is None or turn.held):
        held = None
        if part.scores is not None:
            held = pad(part.scores[..., : turn.held - left], (left, 0))
        running = text_scores(turn, rule, candidates[:, :1], held, groups)
    own = [plan.text for plan in plans]
    counts = part.extend(new.sum(dim=(1, 2)).tolist(), own)
    if joint is not None and joint.decoding == "grow":
        sinks = [0 if turn.held else plan.sink for plan in plans]
        newest = [min(joint.newest(n), n - s) for n, s in zip(own, sinks, strict=True)]
        chosen = choose(scores, candidates[..., turn.held :], places[..., turn.held :], own, sinks, newest)
        return torch.cat([was, chosen], dim=-1), counts, None
    ranked = running
    if joint is not None and not turn.held:
        ranked, running = scores, scores if rule.running else None
    if ranked is None:
        ranked = places.float()
    sinks = [min(rule.sink(pool), n) for pool, n in zip(part.pools, counts, strict=True)]
    newest = [min(n, c - s) for (_, n), c, s in zip(part.rooms(), counts, sinks, strict=True)]
    return choose(ranked, candidates, places, counts, sinks, newest), counts, running


def choose(
    scores: Tensor,
    candidates: Tensor,
    positions: Tensor,
    counts: list[int],
    sinks: list[int],
    newest: list[int],
) -> Tensor:
    """Mark `counts` candidates of each row: its `sinks` first, its `newest`, and the best others.

    `scores`, `candidates` (bool) and `positions` are `[B, G, n]`; so is the answer.
    """
    device = scores.device
    placed = positions.masked_fill(~candidates, torch.iinfo(positions.dtype).max)
    rank = placed.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    total = candidates.sum(dim=-1, keepdim=True)
    safe = (rank < per_row(sinks, device)) | (rank >= total - per_row(newest, device))
    ranked = scores.masked_fill(safe & candidates, float("inf"))
    return best(ranked, candidates, per_row(counts, device)[:, 0, 0], positions)


def merged(held: list[RowPlan], new: list[RowPlan], texts: list[int]) -> list[RowPlan]:
    """Plans after a turn that adds `new` to what is `held` (nothing at first), with `texts` text tokens."""
    if not held:
        return [replace(plan, text=text) for plan, text in zip(new, texts, strict=True)]
    return [
        RowPlan(a.system + b.system, a.vision + b.vision, a.core + b.core, text, a.sink, b.limit)
        for a, b, text in zip(held, new, texts, strict=True)
    ]
