"""Token counts of many policies over a batch of prompts, as tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avlprof.attention.call import AttentionCall
from avlprof.attention.weights import softmax
from avlprof.policy import Policy, PromptShape, broadcast, sizes, text_room
from avlprof.runtime.forced.prompt import PromptLayer


@dataclass(frozen=True)
class TextRoom:
    """Room of the text part of a layer, or of a joint pool.

    `limit` and `newest` are `[B, P, T + 1]`: most tokens held and how many of them are the newest,
    right after the prompt and then after each step; `sink [B, P]` first ones are never evicted.
    """

    sink: Tensor
    limit: Tensor
    newest: Tensor


class Plans:
    """Counts of `P` policies that differ in their shares alone (see `packing`).

    The text part of a split pool is the same for all of them, so its P is 1.
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        shapes: Sequence[PromptShape],
        layers: int,
        steps: int,
        device: torch.device,
    ) -> None:
        self.policies, self.shapes, self.layers, self.steps = policies, shapes, layers, steps
        self._device = device
        tables = {shape: [_table(policy, shape, layers) for policy in policies] for shape in set(shapes)}
        counts = torch.tensor([tables[shape] for shape in shapes], device=device)
        self._kept, self._core, self._text_kept = counts.permute(3, 2, 0, 1)
        self._rooms: dict[int, TextRoom] = {}

    def vision(self, layer: int) -> tuple[Tensor, Tensor]:
        """Kept and core counts `[B, P]`; of a joint pool that grows both are its prompt tokens."""
        joint = self.policies[0].joint is not None
        kept = self._text_kept if joint else self._kept
        return kept[layer], kept[layer] if joint else self._core[layer]

    def room(self, layer: int) -> TextRoom:
        """Room of the text part, or of a joint pool."""
        key = self.room_key(layer)
        if key not in self._rooms:
            self._rooms[key] = self._pool(layer) if self.policies[0].joint else self._text(layer)
        return self._rooms[key]

    def room_key(self, layer: int) -> int:
        """Layers with one key have one room."""
        first = self.policies[0]
        text = (first.text.window, first.text.sink, first.text.heavy, first.text.keep)
        listed = [*text, *(p.joint.keep for p in self.policies if p.joint)]
        return layer if any(isinstance(value, tuple) for value in listed) else 0

    def _text(self, layer: int) -> TextRoom:
        policy = self.policies[0]
        first, last = min(s.text for s in self.shapes), max(s.text for s in self.shapes) + self.steps
        table = torch.tensor([text_room(policy, seen, 0, layer) for seen in range(first, last + 1)])
        texts = torch.tensor([shape.text for shape in self.shapes])
        rooms = table[(texts - first)[:, None, None] + torch.arange(self.steps + 1)].to(self._device)
        sink = 0 if policy.text.window is None else broadcast(policy.text.sink, self.layers)[layer]
        sinks = torch.full((len(self.shapes), 1), sink, device=self._device)
        return TextRoom(sinks, rooms[..., 0], rooms[..., 1])

    def _pool(self, layer: int) -> TextRoom:
        pools = self._text_kept[layer]
        sink, limit, newest = [], [], []
        for row in pools.tolist():
            for policy, count in zip(self.policies, row, strict=True):
                assert policy.joint is not None
                most, safe = text_room(policy, 0, count, layer)
                sink.append(min(policy.joint.sink, count))
                limit.append([count] + [most] * self.steps)
                newest.append([policy.joint.newest(count)] + [safe] * self.steps)
        shape = (*pools.shape, self.steps + 1)
        tensors = [torch.tensor(values, device=self._device) for values in (sink, limit, newest)]
        return TextRoom(tensors[0].view(pools.shape), tensors[1].view(shape), tensors[2].view(shape))


def _table(policy: Policy, shape: PromptShape, layers: int) -> list[tuple[int, int, int]]:
    return [(size.vision, size.core, size.text) for size in sizes(policy, shape, layers)]


_WEIGHTS = 1 << 20  # attention weights that exist at a time: few enough for a CPU cache


class AnswerRows:
    """Queries, keys and values of all answer rows of `P` policies.

    The model's batch holds the policies of the first prompt, then those of the second. Here they are
    an axis of their own, `[B, Hkv, P, g, T, D]` with `g` query heads in a group, so that one product
    serves all policies of a prompt and the prompt's keys are never repeated.

    `stored` is the prompt as few bits leave it, for policies whose cores are picked anew: `full`, bool
    `[B, G, P, R, N]`, then says of which of its columns each row sees the numbers in full precision.
    """

    def __init__(
        self, call: AttentionCall, prompt: PromptLayer, policies: int, stored: PromptLayer | None = None
    ) -> None:
        self.call, self.prompt = call, prompt
        self.stored = None if stored is None else (stored.key.float(), stored.value.float() - prompt.value)
        batch, groups = prompt.key.shape[:2]
        query, key, value = (
            states.reshape(batch, policies, groups, -1, *states.shape[2:])
            for states in (call.query, call.key, call.value)
        )
        self.query = query.permute(0, 2, 1, 3, 4, 5).float()
        self.key, self.value = (states[:, :, :, 0].transpose(1, 2).float() for states in (key, value))
        self._key, self._value = prompt.key.float(), prompt.value.float()
        self._sinks = None if call.sinks is None else call.sinks.view(groups, 1, -1, 1)
        self.length, self.steps = prompt.key.shape[2], call.key.shape[2]

    @property
    def columns(self) -> int:
        """Prompt tokens and answer tokens: what a row can look at."""
        return self.length + self.steps

    def blocks(self, rows: range) -> Iterator[range]:
        """Parts of `rows` whose weights may exist at a time."""
        batch, groups, policies, heads = self.query.shape[:4]
        size = max(_WEIGHTS // (batch * groups * policies * heads * self.columns), 1)
        for start in range(0, len(rows), size):
            yield rows[start : start + size]

    def logits(self, rows: range, full: Tensor | None = None) -> Tensor:
        """Scaled products `[B, Hkv, P, g, R, N + T]` of some rows with all columns, fp32."""
        query = self.query[..., rows.start : rows.stop : rows.step, :]
        shape = query.shape[:-1]
        prompt = (query.flatten(2, 4) @ self._key.mT).view(*shape, self.length)
        if full is not None and self.stored is not None:
            stored = (query.flatten(2, 4) @ self.stored[0].mT).view_as(prompt)
            prompt = torch.where(full.unsqueeze(3), prompt, stored)
        answer = query.flatten(3, 4) @ self.key.mT
        logits = torch.cat([prompt, answer.view(*shape, self.steps)], dim=-1)
        logits *= self.call.scaling
        if self.call.softcap is not None:
            logits = self.call.softcap * torch.tanh(logits / self.call.softcap)
        return logits

    def mean_key(self, tokens: Tensor, whole: Tensor) -> Tensor:
        """Mean `[B, Hkv, P, D]` of the keys of `tokens`, of which rows see `whole` in full precision.

        Both are bool `[B, G, P, N]`. Of no token it is 0.
        """
        heads = self._key.shape[1]
        near = tokens if self.stored is None else tokens & whole
        total = near.expand(-1, heads, -1, -1).float() @ self._key
        if self.stored is not None:
            total = total + (tokens & ~whole).expand(-1, heads, -1, -1).float() @ self.stored[0]
        return total / tokens.sum(dim=-1, keepdim=True).clamp(min=1)

    def weights(self, logits: Tensor) -> Tensor:
        """Softmax of logits `[B, Hkv, P, g, N + T]` of a row, or `[B, Hkv, P, g, R, N + T]` of some."""
        sinks = self._sinks
        return softmax(logits, sinks if sinks is None or logits.ndim == 5 else sinks.unsqueeze(-1))

    def mixed(self, weights: Tensor, full: Tensor | None = None) -> Tensor:
        """Output `[B, Hkv, P, g, R, D]` of rows with weights `[B, Hkv, P, g, R, N + T]`."""
        own = weights[..., : self.length]
        prompt = own.flatten(2, 4) @ self._value
        if full is not None and self.stored is not None:
            prompt = prompt + own.masked_fill(full.unsqueeze(3), 0.0).flatten(2, 4) @ self.stored[1]
        answer = weights[..., self.length :].flatten(3, 4) @ self.value
        return prompt.view(*weights.shape[:-1], -1) + answer.view(*weights.shape[:-1], -1)

    def joined(self, blocks: list[Tensor]) -> Tensor:
        """The blocks' outputs as the model takes them: `[B * P, T, H, D]`."""
        out = torch.cat(blocks, dim=4) if len(blocks) > 1 else blocks[0]
        return out.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(0, 1).to(self.call.query.dtype)


def with_prompt(always: Tensor, chosen: Tensor) -> Tensor:
    """Add prompt tokens `[B, G, P, R, N]` to what rows `[B, P, R, N + T]` see anyway."""
    extra = always.shape[-1] - chosen.shape[-1]
    return always[:, None] | torch.nn.functional.pad(chosen, (0, extra))


def head_mean(weights: Tensor, groups: int) -> Tensor:
    """Mean over query heads: `[B, Hkv, P, g, ...]` to `[B, groups, P, ...]`, groups being 1 or Hkv."""
    if groups == 1:
        return weights.mean(dim=(1, 3)).unsqueeze(1)
    return weights.mean(dim=3)
