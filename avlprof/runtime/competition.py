"""Who stays after a prompt or a further turn: new tokens against each other and against what is held."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from avlprof.attention.modality import Modality
from avlprof.attention.rows import group_mean
from avlprof.attention.selection import best
from avlprof.runtime.layout import CORE, PADDING, STORED, TEXT, RowPlan, per_row
from avlprof.runtime.text_part import TextPart
from avlprof.runtime.turns import Turn, text_scores


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
