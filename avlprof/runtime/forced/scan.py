"""Forced attention row by row, where what a row evicts decides what later rows see."""

from __future__ import annotations

import torch
from torch import Tensor

from avlprof.attention.modality import Modality
from avlprof.attention.ranking import prompt_scores, ranks, step_scores
from avlprof.runtime.forced.cores import RunningCore
from avlprof.runtime.forced.prompt import Prompts, left_aligned
from avlprof.runtime.forced.rows import AnswerRows, Plans, head_mean
from avlprof.runtime.forced.sets import chosen_prompt


class Pool:
    """Tokens of a layer that compete while decoding: text and answer, or all of a joint pool.

    Slots are in the order of positions: the prompt's, left-aligned, and then the answer's. `alive`
    and `scores` are `[B, G, P, C + T]`; `seen [B, G, P, N + T]` holds the same by column.
    """

    def __init__(self, plans: Plans, prompts: Prompts, layer: int, groups: int) -> None:
        modality = prompts.layers[layer].modality
        policy = plans.policies[0]
        assert policy.running is not None
        self._kind, self._deleted, self._room = policy.running, policy.deleted(layer), plans.room(layer)
        if policy.joint is None:
            competes, alive, scores = self._text(modality, prompts.text[layer], len(plans.policies))
        else:
            competes, alive, scores = self._joint(modality, plans, prompts, layer, groups)
        steps, length = plans.steps, modality.shape[1]
        order, _ = left_aligned(competes)
        answer = torch.arange(length, length + steps, device=order.device).expand(order.shape[0], -1)
        columns = torch.cat([order, answer], dim=1)[:, None, None]
        self._first = order.shape[1]
        self._alive = torch.nn.functional.pad(alive, (0, steps))
        self._scores = torch.nn.functional.pad(scores, (0, steps))
        self._columns = columns.expand_as(self._alive)
        self._length = length
        blank = alive.new_zeros((*alive.shape[:3], length + steps))
        self.seen = blank.scatter(-1, self._columns, self._alive)

    def join(self, step: int) -> None:
        """The token of step `step` (from 0) comes in, before its row attends."""
        self._alive[..., self._first + step] = True
        self.seen[..., self._length + step] = True

    def attended(self, step: int, weights: Tensor) -> None:
        """Score the pool by a row's weights `[B, Hkv, P, g, N + T]`; where it is full, the worst goes."""
        row = head_mean(weights, self.seen.shape[1]).gather(-1, self._columns)
        newest = torch.zeros_like(self._alive)
        newest[..., self._first + step] = True
        self._scores = step_scores(self._kind, self._scores, row, self._alive, newest, self._deleted)
        rank = self._alive.cumsum(dim=-1)
        count = rank[..., -1:]
        room = self._room
        safe = (rank <= room.sink[:, None, :, None]) | (
            count - rank < room.newest[:, None, :, step + 1, None]
        )
        loose = self._scores.masked_fill(safe | ~self._alive, float("inf"))
        worst = loose.shape[-1] - 1 - loose.flip(-1).argmin(dim=-1, keepdim=True)
        stays = self._alive.gather(-1, worst) & (count <= room.limit[:, None, :, step + 1, None])
        self._alive.scatter_(-1, worst, stays)
        self.seen.scatter_(-1, self._columns.gather(-1, worst), stays)

    def _text(self, modality: Tensor, weights: Tensor, policies: int) -> tuple[Tensor, Tensor, Tensor]:
        competes = modality == Modality.TEXT
        count = competes.sum(dim=1)[:, None, None]
        most = int(count.max())  # fewer than the whole batch has, when this is a part of it
        scores = prompt_scores(self._kind, weights[..., :most, :most], self._deleted)
        index = torch.arange(scores.shape[-1], device=scores.device)
        room = self._room
        safe = (index < room.sink[:, :, None]) | (index >= count - room.newest[:, :, :1])
        ranked = scores.masked_fill(safe, float("inf")).masked_fill(index >= count, float("-inf"))
        alive = (ranks(ranked) < room.limit[:, :, :1]) & (index < count)
        shape = (-1, -1, policies, -1)
        return competes, alive.unsqueeze(2).expand(shape), scores.unsqueeze(2).expand(shape)

    def _joint(
        self, modality: Tensor, plans: Plans, prompts: Prompts, layer: int, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        competes = modality != Modality.PAD
        kept, _ = chosen_prompt(plans, prompts, layer, groups)
        scores = torch.stack([prompts.group_scores(p.scorer, groups, layer) for p in plans.policies], dim=2)
        order, real = left_aligned(competes)
        index = order[:, None, None].expand(*kept.shape[:3], -1)
        return competes, kept.gather(-1, index) & real[:, None, None], scores.gather(-1, index)


def attend_in_order(rows: AnswerRows, plans: Plans, prompts: Prompts, layer: int, groups: int) -> Tensor:
    """Output `[B * P, T, H, D]` of all rows of a layer; `groups` is the granularity of vision sets."""
    policy = plans.policies[0]
    modality = prompts.layers[layer].modality
    joint = policy.joint is not None
    pool = Pool(plans, prompts, layer, groups if joint else prompts.layers[layer].key.shape[1])
    fixed = core = kept = modality.new_zeros((modality.shape[0], 1, 1, rows.columns), dtype=torch.bool)
    running: RunningCore | None = None
    if not joint:
        fixed = torch.nn.functional.pad(modality == Modality.SYSTEM, (0, rows.steps))[:, None, None]
        chosen = chosen_prompt(plans, prompts, layer, groups)
        kept, core = (torch.nn.functional.pad(c, (0, rows.steps)) for c in chosen)
        running = RunningCore.of(plans, prompts, layer, chosen)
    every = 0 if running is None else policy.refresh_interval
    scored = running if policy.scores_core else None

    def weigh(logits: Tensor, vision: Tensor) -> Tensor:
        seen = pool.seen | vision | fixed
        return rows.weights(logits.masked_fill(~seen.unsqueeze(3), float("-inf")))

    def picked(weights: Tensor) -> Tensor:
        assert running is not None
        return torch.nn.functional.pad(
            running.pick(head_mean(weights[..., : rows.length], groups), running.kept), (0, rows.steps)
        )

    outputs = []
    whole = (core | ~kept)[..., : rows.length]  # in full precision, where the rest is stored in few bits
    none = torch.zeros_like(whole).unsqueeze(3)
    for block in rows.blocks(range(rows.steps)):
        logits, full = rows.logits(block), []
        stored = logits if rows.stored is None else rows.logits(block, none)
        for index, step in enumerate(block):
            row = logits[..., index, :]
            if rows.stored is not None:
                full.append(whole)
                near = torch.nn.functional.pad(whole, (0, rows.steps), value=True).unsqueeze(3)
                row = torch.where(near, row, stored[..., index, :])
            pool.join(step)
            due = every > 0 and (step + 1) % every == 0
            refresh = due and policy.refresh == "full"
            if due and not refresh:
                core = picked(weigh(row, kept))
                whole = whole & (core | ~kept)[..., : rows.length]
                full[-1:] = [whole] * len(full[-1:])
            weights = weigh(row, kept if refresh else core)
            if refresh:
                core = picked(weights)
                whole = whole & (core | ~kept)[..., : rows.length]
            elif scored is not None and not due:
                scored.attended(head_mean(weights[..., : rows.length], groups), scored.core)
            pool.attended(step, weights)
            logits[..., index, :] = weights
        outputs.append(rows.mixed(logits, torch.stack(full, dim=3) if full else None))
    return rows.joined(outputs)
