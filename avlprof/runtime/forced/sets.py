"""What every answer row sees of a layer, for all rows at once: no set depends on an earlier eviction."""

from __future__ import annotations

import torch
from torch import Tensor

from avlprof.attention.modality import Modality
from avlprof.attention.ranking import best_pairs, ranks
from avlprof.runtime.forced.cores import CorePicker, RunningCore, StepWeights, Told
from avlprof.runtime.forced.packing import scorers_of
from avlprof.runtime.forced.prompt import Prompts
from avlprof.runtime.forced.rows import AnswerRows, Plans, TextRoom, head_mean, with_prompt
from avlprof.runtime.support import not_leading


def chosen_prompt(plans: Plans, prompts: Prompts, layer: int, groups: int) -> tuple[Tensor, Tensor]:
    """Kept and core tokens of the prompt, bool `[B, G, P, N]`, right after prefill.

    In a split pool they are vision tokens; in a joint one any, and both are the same.
    """
    if not scorers_of(plans.policies):
        vision = (prompts.layers[layer].modality == Modality.VISION)[:, None, None]
        return vision, vision
    counts, cores = plans.vision(layer)
    if plans.policies[0].heads == "adaptive":
        pairs = _best_pairs(plans, prompts, layer, groups)
        return pairs, pairs
    ranked = _pool_ranks if plans.policies[0].joint is not None else _vision_ranks
    rank = ranked(plans, prompts, layer, groups)
    kept = rank < counts[:, None, :, None]
    return kept, rank < cores[:, None, :, None]


class VisionSets:
    """Vision tokens that each row sees: the core of prefill, then that of each refresh.

    `full` refresh rows see all that is kept; under `score_only` they see the core that they pick. Where
    the rest is stored in few bits, a token is as good as it was as long as it has always been core.
    Where what a refresh picks, or when, depends on more than its own row, one step comes after the other
    (`cores`); `due`, bool `[B, P, T]`, are then the steps that refresh.
    """

    def __init__(
        self,
        rows: AnswerRows,
        plans: Plans,
        sets: tuple[Tensor, Tensor],
        always: Tensor,
        layer: int,
        prompts: Prompts,
        told: dict[int, Told],
    ) -> None:
        """`sets` are the kept and the core tokens after prefill, as `chosen_prompt` gives them.

        `told` is what layers have told those behind them.
        """
        kept, core = sets
        policy = plans.policies[0]
        self._every = policy.refresh_interval
        self._full = policy.refresh == "full"
        self._sets = core[:, :, :, None]
        self._whole: Tensor | None = None
        self._by_step = False
        self.due: Tensor | None = None
        counts, cores = plans.vision(layer)
        lead, idle = policy.leader(layer), bool((counts == cores).all())
        never = not self._every or (self._every > rows.steps and not policy.triggered)
        if never or lead is None or (idle and not policy.leads(layer)):
            self._every = 0
            return
        if policy.scores_core or policy.triggered or lead != layer or policy.leads(layer):
            if lead != layer and lead not in told:
                raise not_leading(policy, lead)
            running = RunningCore(plans, prompts, layer, sets)
            picker = CorePicker(rows, plans, running, layer, None if lead == layer else told[lead])
            steps = picker.steps(StepWeights(rows, always, core))
            self._sets, self._by_step, self.due = steps.seen, True, steps.due
            self._whole = None if rows.stored is None else steps.whole
            if steps.told is not None:
                told[layer] = steps.told
            return
        cored = [self._sets]
        if rows.stored is not None:
            whole = [self._sets | ~kept[:, :, :, None]]
            for step in range(self._every - 1, rows.steps, self._every):
                cored.append(_refreshed(rows, kept, cores, always, range(step, step + 1), whole[-1]))
                whole.append(whole[-1] & (cored[-1] | ~kept[:, :, :, None]))
            self._whole = torch.cat(whole, dim=3)
        elif self._every > 1 or not self._full:
            refreshes = range(self._every - 1, rows.steps, self._every)
            cored += [_refreshed(rows, kept, cores, always, block) for block in rows.blocks(refreshes)]
        self._sets = torch.cat([*cored, kept[:, :, :, None]], dim=3)

    def full(self, block: range) -> Tensor | None:
        """bool `[B, G, P, R, N]`, columns of which rows of a block see full numbers; None: all rows all."""
        if self._whole is None:
            return None
        if self._by_step:
            return self._whole[:, :, :, block.start : block.stop]
        steps = torch.arange(block.start + 1, block.stop + 1, device=self._whole.device)
        before = (steps % self._every == 0) if self._full else torch.zeros_like(steps)
        return self._whole.index_select(3, steps // self._every - before.long())

    def seen(self, block: range) -> Tensor:
        """bool `[B, G, P, R or 1, N]` of the rows of a block."""
        if not self._every:
            return self._sets
        if self._by_step:
            return self._sets[:, :, :, block.start : block.stop]
        steps = torch.arange(block.start + 1, block.stop + 1, device=self._sets.device)
        index = steps // self._every
        if self._full:
            index = torch.where(steps % self._every == 0, self._sets.shape[3] - 1, index)
        return self._sets.index_select(3, index)


def _refreshed(
    rows: AnswerRows,
    kept: Tensor,
    cores: Tensor,
    always: Tensor,
    block: range,
    full: Tensor | None = None,
) -> Tensor:
    """Core `[B, G, P, R, N]` that each refresh row of a block picks among the kept tokens."""
    logits = rows.logits(block, full)
    seen = with_prompt(always[:, :, block.start : block.stop : block.step], kept[:, :, :, None])
    weights = rows.weights(logits.masked_fill_(~seen.unsqueeze(3), float("-inf")))
    scores = head_mean(weights[..., : rows.length], kept.shape[1])
    rank = ranks(scores.masked_fill(~kept[:, :, :, None], float("-inf")))
    return rank < cores[:, None, :, None, None]


def always_visible(modality: Tensor, room: TextRoom, joint: bool, grows: bool) -> Tensor:
    """bool `[B, P, T, N + T]`: system, the text that stays by its age, and the answer so far.

    Text and generated tokens are numbered together; a row sees the first `sink` and the newest
    of them, itself included. A joint pool that grows shows no prompt token here.
    """
    steps = room.limit.shape[-1] - 1
    device = modality.device
    text = modality != Modality.PAD if joint else modality == Modality.TEXT
    count = text.sum(dim=1, keepdim=True)
    now = (count + torch.arange(steps, device=device))[:, None, :, None]
    index = torch.cat([text.long().cumsum(dim=1) - 1, now[:, 0, :, 0]], dim=1)[:, None, None]
    prompt_text = text & (not grows)
    is_text = torch.cat([prompt_text, torch.ones_like(now[:, 0, :, 0], dtype=torch.bool)], dim=1)[
        :, None, None
    ]
    sink = room.sink[:, :, None, None]
    newest = room.limit[:, :, 1:, None] - sink
    spoken = is_text & (index <= now)
    if not grows:
        spoken = spoken & ((index < sink) | (index > now - newest))
    if joint:
        return spoken
    system = torch.nn.functional.pad(modality == Modality.SYSTEM, (0, steps))[:, None, None]
    return spoken | system


def _vision_ranks(plans: Plans, prompts: Prompts, layer: int, groups: int) -> Tensor:
    specs = [policy.scorer for policy in plans.policies]
    by_policy = [prompts.vision_ranks(spec, groups, layer) for spec in specs]
    if all(spec == specs[0] for spec in specs):
        return by_policy[0][:, :, None]
    return torch.stack(by_policy, dim=2)


def _best_pairs(plans: Plans, prompts: Prompts, layer: int, groups: int) -> Tensor:
    """Kept vision tokens `[B, G, P, N]` where heads differ in their counts."""
    vision = (prompts.layers[layer].modality == Modality.VISION)[:, None]
    counts, _ = plans.vision(layer)
    chosen = [
        best_pairs(
            prompts.group_scores(policy.scorer, groups, layer),
            vision,
            counts[:, index],
            policy.head_parts(layer, groups) or (),
        )
        for index, policy in enumerate(plans.policies)
    ]
    return torch.stack(chosen, dim=2)


def _pool_ranks(plans: Plans, prompts: Prompts, layer: int, groups: int) -> Tensor:
    """Ranks `[B, G, P, N]` in a joint pool: the first and the newest tokens come before all others."""
    valid = prompts.layers[layer].modality != Modality.PAD
    index = valid.long().cumsum(dim=1) - 1
    room = plans.room(layer)
    after = valid.sum(dim=1, keepdim=True) - index
    safe = (index[:, None] < room.sink[..., None]) | (after[:, None] <= room.newest[..., :1])
    scores = torch.stack([prompts.group_scores(p.scorer, groups, layer) for p in plans.policies], dim=2)
    ranked = scores.masked_fill(safe[:, None], float("inf"))
    return ranks(ranked.masked_fill(~valid[:, None, None], float("-inf")))
