"""A policy's attention over a whole answer at once, under teacher forcing.

Given the tokens, A-VL is exact in one forward pass: in each layer the core of a step depends
only on that layer's queries and keys of earlier steps, so the refresh rows are scored, the sets
chosen, and all rows attend in parallel, each to its own set. The prompt's keys are shared by
every policy and never copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from avlprof.attention.call import AttentionCall, Forward
from avlprof.attention.modality import Modality, prompt_shapes
from avlprof.attention.rows import group_mean, row_logits
from avlprof.attention.selection import best
from avlprof.policy import Policy
from avlprof.runtime.cache import is_sliding, row_plan, stock_layers
from avlprof.runtime.context import as_joint
from avlprof.runtime.dense import BufferedLayer
from avlprof.runtime.layout import RowPlan


@dataclass(frozen=True)
class PromptLayer:
    """One layer's dense KV of a batch of prompts: `[B, Hkv, N, D]`."""

    key: Tensor
    value: Tensor


class PassThrough(BufferedLayer):
    """A layer that stores nothing: it reports a prompt of `seen` tokens and hands through."""

    def __init__(self, seen: int) -> None:
        super().__init__()
        self.seen = seen

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The answer's own keys and values, unchanged."""
        return key_states, value_states


class ForcedCache(Cache):
    """A cache that pretends to hold a prompt of `length` tokens in each of `layers` layers."""

    def __init__(self, layers: int, length: int) -> None:
        super().__init__(layers=[PassThrough(length) for _ in range(layers)])


class ForcedRuntime:
    """Attention of all answer rows under a policy, against prompts that were prefilled once.

    `scores` are the policy's scorer's, `[B, G, N]` per layer. Layers with a sliding window attend
    by it, whatever the policy says.

    Raises:
        UserError: a layer of `text_config`'s model attends in yet another way.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: list[PromptLayer],
        scores: list[Tensor],
        modality: Tensor,
        text_config: Any,
    ) -> None:
        self.policy, self.prompts, self.scores = policy, prompts, scores
        self.sliding = [is_sliding(layer) for layer in stock_layers(text_config)]
        self.modality = as_joint(modality) if policy.joint else modality
        self.shapes = prompt_shapes(self.modality)

    def new_cache(self) -> ForcedCache:
        """A cache of the prompts' padded length."""
        return ForcedCache(len(self.prompts), self.modality.shape[1])

    def owns(self, cache: object) -> bool:
        """Whether a cache is a forced one."""
        return isinstance(cache, ForcedCache)

    def attend(self, forward: Forward, cache: object, call: AttentionCall) -> tuple[Tensor, AttentionCall]:
        """Output `[B, T, H, D]` of every answer row over what the policy lets it see."""
        prompt = self.prompts[call.layer]
        logits = torch.cat(
            [
                row_logits(call.query, prompt.key, call.scaling, call.softcap),
                row_logits(call.query, call.key, call.scaling, call.softcap),
            ],
            dim=-1,
        )
        visible = call.mask if self.sliding[call.layer] else self._governed(call.layer, logits)
        if visible is not None:
            logits = logits.masked_fill(~visible, float("-inf"))
        weights = logits.softmax(dim=-1)
        length = prompt.key.shape[2]
        out = _mix(weights[..., :length], prompt.value) + _mix(weights[..., length:], call.value)
        return out.transpose(1, 2).to(call.query.dtype), call

    def _governed(self, layer: int, logits: Tensor) -> Tensor:
        """bool `[B, H, T, N + T]`: what each answer row sees in a layer under the policy."""
        plans = [row_plan(self.policy, shape, layer, len(self.prompts)) for shape in self.shapes]
        always = _always_visible(self.modality, plans, logits.shape[2])
        kept, cores = self._vision_sets(layer, plans, logits, always)
        heads = logits.shape[1] // self.scores[layer].shape[1]
        return self._visible(always, kept, cores).repeat_interleave(heads, dim=1)

    def _vision_sets(
        self, layer: int, plans: list[RowPlan], logits: Tensor, always: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Kept set `[B, G, N]`, and the core sets: prefill's, then one per refresh step."""
        scores = self.scores[layer]
        groups, length = scores.shape[1:]
        vision = (self.modality == Modality.VISION)[:, None].expand_as(scores)
        kept = best(scores, vision, scores.new_tensor([p.vision for p in plans]))
        core_counts = scores.new_tensor([p.core for p in plans])
        cores = [best(scores, kept, core_counts)]
        every = self.policy.refresh_interval
        if not every or all(p.core == p.vision for p in plans):
            return kept, cores
        if every > logits.shape[2]:
            return kept, cores
        rows = torch.arange(every - 1, logits.shape[2], every, device=logits.device)
        seen = _with_vision(always[:, rows], kept[:, :, None].expand(-1, -1, len(rows), -1))
        heads = logits.shape[1] // groups
        weights = (
            logits[:, :, rows]
            .masked_fill(~seen.repeat_interleave(heads, dim=1), float("-inf"))
            .softmax(dim=-1)
        )
        ranked = group_mean(weights[..., :length], groups)
        for i in range(len(rows)):
            cores.append(best(ranked[:, :, i], kept, core_counts))
        return kept, cores

    def _visible(self, always: Tensor, kept: Tensor, cores: list[Tensor]) -> Tensor:
        """bool `[B, G, T, N + T]` of what each answer row sees."""
        steps = torch.arange(1, always.shape[1] + 1, device=always.device)
        every = self.policy.refresh_interval
        if len(cores) == 1:
            chosen = cores[0][:, :, None].expand(-1, -1, len(steps), -1)
        else:
            stacked = torch.stack([*cores, kept], dim=2)
            index = torch.where(steps % every == 0, len(cores), steps // every)
            chosen = stacked[:, :, index]
        return _with_vision(always, chosen)


def _always_visible(modality: Tensor, plans: list[RowPlan], steps: int) -> Tensor:
    """bool `[B, T, N + T]`: system, the text window, and the answer so far, per row.

    Text and generated tokens are numbered together; a row sees the first `sink` and the newest
    of them, itself included.
    """
    device = modality.device
    text = modality == Modality.TEXT
    count = text.sum(dim=1, keepdim=True)
    prompt_index = text.long().cumsum(dim=1) - 1
    answer_index = count + torch.arange(steps, device=device)
    is_text = torch.cat([text, torch.ones_like(answer_index, dtype=torch.bool)], dim=1)[:, None]
    index = torch.cat([prompt_index, answer_index], dim=1)[:, None]
    now = answer_index[:, :, None]
    sink = torch.tensor([p.sink for p in plans], device=device)[:, None, None]
    window = torch.tensor(
        [index.shape[-1] if p.limit is None else p.limit - p.sink for p in plans], device=device
    )[:, None, None]
    spoken = is_text & (index <= now) & ((index < sink) | (index > now - window))
    system = torch.nn.functional.pad(modality == Modality.SYSTEM, (0, steps))[:, None]
    return spoken | system


def _with_vision(always: Tensor, vision: Tensor) -> Tensor:
    """Add vision sets `[B, G, R, N]` to what rows `[B, R, N + T]` see anyway."""
    extra = always.shape[-1] - vision.shape[-1]
    return always[:, None] | torch.nn.functional.pad(vision, (0, extra))


def _mix(weights: Tensor, value: Tensor) -> Tensor:
    """`weights [B, H, T, n]` times `value [B, Hkv, n, D]` in fp32, heads packed by group: `[B, H, T, D]`."""
    batch, heads, rows, length = weights.shape
    packed = weights.view(batch, value.shape[1], -1, length) @ value.float()
    return packed.view(batch, heads, rows, value.shape[-1])
