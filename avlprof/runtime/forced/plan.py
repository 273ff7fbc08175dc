"""Token counts of many policies over a batch of prompts, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avlprof.policy import Policy, PromptShape, broadcast, sizes, text_room


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
    """Counts of `P` policies that differ in their shares alone (see `groups`).

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
        known = {shape: [_table(policy, shape, layers) for policy in policies] for shape in set(shapes)}
        counts = torch.tensor([known[shape] for shape in shapes], device=device)
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

    def deleted(self, layer: int) -> float:
        """Share of the text that goes: the quantile of A-VL's history."""
        keep = self.policies[0].text.keep
        return 0.0 if keep is None else 1.0 - broadcast(keep, self.layers)[layer]

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
        held = self._text_kept[layer]
        sink, limit, newest = [], [], []
        for row in held.tolist():
            for policy, count in zip(self.policies, row, strict=True):
                assert policy.joint is not None
                most, safe = text_room(policy, 0, count, layer)
                sink.append(min(policy.joint.sink, count))
                limit.append([count] + [most] * self.steps)
                newest.append([policy.joint.newest(count)] + [safe] * self.steps)
        shape = (*held.shape, self.steps + 1)
        made = [torch.tensor(values, device=self._device) for values in (sink, limit, newest)]
        return TextRoom(made[0].view(held.shape), made[1].view(shape), made[2].view(shape))


def _table(policy: Policy, shape: PromptShape, layers: int) -> list[tuple[int, int, int]]:
    return [(size.vision, size.core, size.text) for size in sizes(policy, shape, layers)]
