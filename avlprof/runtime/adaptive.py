"""The cache layer of a policy: evicts after prefill, reads a core, refreshes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avlprof.attention.modality import Modality
from avlprof.attention.rows import group_mean, row_weights
from avlprof.attention.selection import best
from avlprof.errors import UserError
from avlprof.runtime.dense import RESERVE, BufferedLayer, grown
from avlprof.runtime.layout import (
    CORE,
    STORED,
    RowPlan,
    exchange,
    left_classes,
    left_order,
    swaps,
    take,
    text_kept,
    text_order,
)
from avlprof.scorers import Prefill, Scorer


@dataclass
class Reads:
    """Tokens attended to while decoding, summed over rows; divide by rows and steps."""

    steps: int = 0
    refreshes: int = 0
    prompt: int = 0
    generated: int = 0


class AdaptiveLayer(BufferedLayer):
    """One layer's KV under a policy; see `layout` for the order of its slots.

    In prefill `update` hands through what it is given; `compact` then scores, evicts and lays
    out. At each decoding step `update` writes the token and returns the views to attend to, and
    `after_step` re-picks the core when the step was a refresh.
    """

    def __init__(self, scorer: Scorer, refresh_interval: int, per_kv_head: bool) -> None:
        super().__init__()
        self.scorer = scorer
        self.refresh_interval = refresh_interval
        self.per_kv_head = per_kv_head
        self.reads = Reads()
        self.plans: list[RowPlan] = []
        self.positions: Tensor | None = None
        self._clear()

    def _clear(self) -> None:
        self._left = 0
        self._text: list[int] = []
        self._prompt_text: list[int] = []
        self._ring: list[int] = []
        self._step = 0
        self._mask: Tensor | None = None

    @property
    def filling(self) -> bool:
        """Whether the layer has not been compacted yet, so the prompt is being attended to."""
        return not self.plans

    @property
    def refreshing(self) -> bool:
        """Whether the current decoding step attends to all kept vision tokens."""
        has_core = any(plan.core < plan.vision for plan in self.plans)
        return has_core and self.refresh_interval > 0 and self._step % self.refresh_interval == 0

    def reset(self) -> None:
        super().reset()
        self.plans, self.positions, self.reads = [], None, Reads()
        self._clear()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take `[B, Hkv, q, D]`; returns the keys and values this step attends to."""
        new = key_states.shape[2]
        if self.seen == 0:
            self.lazy_initialization(key_states, value_states)
            self.seen = new
            return key_states, value_states
        if new != 1:
            raise UserError(
                "a policy's cache takes one token a step after the prompt; further turns and chunked "
                "prefill on the same cache are not supported yet"
            )
        self._step += 1
        self._append(key_states, value_states)
        self.seen += 1
        start, end = self._view()
        self._mask = self._ragged_mask(start, end)
        self._count_reads()
        assert self.keys is not None and self.values is not None
        return self.keys[:, :, start:end], self.values[:, :, start:end]

    def compact(self, prefill: Prefill, plans: list[RowPlan]) -> None:
        """Score the prompt, keep what the plans say, and free the rest.

        Ties are broken towards the lower position.
        """
        modality = prefill.modality
        groups = prefill.key.shape[1] if self.per_kv_head else 1
        scores = group_mean(self.scorer.score(prefill), groups)
        vision = (modality == Modality.VISION)[:, None].expand_as(scores)
        system = (modality == Modality.SYSTEM)[:, None].expand_as(scores)
        kept = best(scores, vision, scores.new_tensor([p.vision for p in plans]))
        core = best(scores, kept, scores.new_tensor([p.core for p in plans]))
        self._left = max(p.system + p.vision for p in plans)
        left = left_order(left_classes(kept, core, system), self._left)
        most_text = max(p.text for p in plans)
        text = text_order(text_kept(modality == Modality.TEXT, plans), most_text)
        order = torch.cat([left, text[:, None].expand(-1, groups, -1)], dim=-1)
        limits = [p.limit for p in plans]
        room = RESERVE if None in limits else max(0, *(limit - most_text for limit in limits if limit))
        self.plans = plans
        self.keys = self._buffer(prefill.key, order, room)
        self.values = self._buffer(prefill.value, order, room)
        self.positions = torch.nn.functional.pad(order, (0, room), value=-1)
        self._text = [p.text for p in plans]
        self._prompt_text = [p.text for p in plans]
        self._ring = [0] * len(plans)

    def after_step(self, query: Tensor, scaling: float, softcap: float | None) -> None:
        """At a refresh step, re-pick the core by this step's attention `query [B, H, 1, D]`."""
        if not self.refreshing:
            return
        assert self.keys is not None and self.positions is not None
        start, end = self._view()
        weights = row_weights(query, self.keys[:, :, start:end], scaling, self._mask, softcap)[:, :, 0]
        scores = group_mean(weights, self.positions.shape[1])[..., : self._left - start]
        column = torch.arange(start, self._left, device=query.device)
        system = column >= self._left - self._per_row([p.system for p in self.plans])
        vision = ~system & (column >= self._left - self._per_row([p.system + p.vision for p in self.plans]))
        in_core = vision & (column >= self._left - self._per_row([p.system + p.core for p in self.plans]))
        old = left_classes(vision, in_core, system).expand_as(scores)
        core = best(
            scores,
            vision.expand_as(scores),
            scores.new_tensor([p.core for p in self.plans]),
            self.positions[:, :, start : self._left],
        )
        new = torch.where((old == STORED) | (old == CORE), torch.where(core, CORE, STORED), old)
        first, second = swaps(old, new)
        if first.shape[-1]:
            for buffer in (self.keys, self.values, self.positions):
                exchange(buffer, first + start, second + start)  # type: ignore[arg-type]

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        picked = rows.tolist()
        for name in ("plans", "_text", "_prompt_text", "_ring"):
            held = getattr(self, name)
            setattr(self, name, [held[row] for row in picked] if held else held)
        if self.positions is not None:
            self.positions = self.positions.index_select(0, rows.to(self.positions.device))

    def allocated_bytes(self) -> int:
        """Bytes of the storage behind keys, values and the slots' positions."""
        index = self.positions.untyped_storage().nbytes() if self.positions is not None else 0
        return super().allocated_bytes() + index

    def stored_tokens(self) -> list[int]:
        """Tokens of each row in memory, prompt and generated."""
        return [p.system + p.vision + text for p, text in zip(self.plans, self._text, strict=True)]

    def stored_prompt_tokens(self) -> list[int]:
        """Prompt tokens of each row in memory."""
        return [p.system + p.vision + text for p, text in zip(self.plans, self._prompt_text, strict=True)]

    def vision_positions(self, row: int) -> tuple[Tensor, Tensor]:
        """Positions of a row's kept and core vision tokens, `[G, kept]` and `[G, core]`."""
        assert self.positions is not None
        plan = self.plans[row]
        end = self._left - plan.system
        held = self.positions[row]
        return held[:, end - plan.vision : end], held[:, end - plan.core : end]

    def attended(self) -> tuple[Tensor, Tensor | None]:
        """Logical positions `[B, G, n]` of the current view's slots, and its mask."""
        assert self.positions is not None
        start, end = self._view()
        return self.positions[:, :, start:end], self._mask

    def _buffer(self, states: Tensor, order: Tensor, room: int) -> Tensor:
        kept = order.shape[-1]
        buffer = states.new_zeros((*states.shape[:2], kept + room, states.shape[3]))
        buffer[:, :, :kept] = take(states, order)
        return buffer

    def _append(self, key: Tensor, value: Tensor) -> None:
        assert self.keys is not None and self.values is not None and self.positions is not None
        slots = [self._left + self._claim(row) for row in range(len(self.plans))]
        capacity = self.keys.shape[2]
        if max(slots) >= capacity:
            larger = capacity + max(RESERVE, capacity // 2)
            self.keys, self.values = grown(self.keys, larger), grown(self.values, larger)
            self.positions = torch.nn.functional.pad(self.positions, (0, larger - capacity), value=-1)
        if len(set(slots)) == 1:
            self.keys[:, :, slots[0]] = key[:, :, 0]
            self.values[:, :, slots[0]] = value[:, :, 0]
            self.positions[:, :, slots[0]] = self.seen
        else:
            rows = torch.arange(len(slots), device=key.device)
            at = torch.tensor(slots, device=key.device)
            self.keys[rows, :, at] = key[:, :, 0]
            self.values[rows, :, at] = value[:, :, 0]
            self.positions[rows, :, at] = self.seen

    def _claim(self, row: int) -> int:
        """The text slot of a row's next token: a free one, or that of its oldest evictable."""
        plan, count = self.plans[row], self._text[row]
        if plan.limit is None or count < plan.limit:
            self._text[row] += 1
            return count
        window = plan.limit - plan.sink
        slot = plan.sink + self._ring[row]
        self._ring[row] = (self._ring[row] + 1) % window
        if self._prompt_text[row] > min(plan.sink, self._prompt_text[row]):
            self._prompt_text[row] -= 1
        return slot

    def _left_seen(self) -> list[int]:
        """System and vision tokens of each row that the current step attends to."""
        refresh = self.refreshing
        return [p.system + (p.vision if refresh else p.core) for p in self.plans]

    def _view(self) -> tuple[int, int]:
        return self._left - max(self._left_seen()), self._left + max(self._text)

    def _ragged_mask(self, start: int, end: int) -> Tensor | None:
        left = self._left_seen()
        if len(set(left)) == 1 and len(set(self._text)) == 1:
            return None
        column = torch.arange(start, end, device=self.device)
        begins = self._left - self._per_row(left)
        ends = self._left + self._per_row(self._text)
        return ((column >= begins) & (column < ends))[:, :, None]

    def _per_row(self, counts: list[int]) -> Tensor:
        return torch.tensor(counts, device=self.device)[:, None, None]

    def _count_reads(self) -> None:
        self.reads.steps += 1
        self.reads.refreshes += int(self.refreshing)
        for left, text, prompt_text in zip(self._left_seen(), self._text, self._prompt_text, strict=True):
            self.reads.prompt += left + prompt_text
            self.reads.generated += text - prompt_text
