"""What a layer attended to while decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from avlprof.attention.call import AttentionCall
from avlprof.attention.modality import Modality
from avlprof.attention.weights import group_mean, step_weights
from avlprof.runtime.buffers import SlotLayer
from avlprof.runtime.eviction import CoreSlots, merged, text_choice, vision_classes
from avlprof.runtime.layout import (
    PADDING,
    SYSTEM,
    TEXT,
    FixedWindows,
    RowPlan,
    Windows,
    left_order,
    slot_classes,
    text_order,
)
from avlprof.runtime.text_part import TextPart, TextRule
from avlprof.runtime.turns import Turn
from avlprof.scorers import Scorer


@dataclass
class Reads:
    """Prompt tokens attended to, summed over rows and steps, save for text that the device counts."""

    steps: int = 0
    refreshes: int = 0
    prompt: float = 0.0
    _usual: int = 0
    _more: int = 0

    def expect(self, plans: list[RowPlan]) -> None:
        """Steps from now on read the system and vision tokens of these plans."""
        self._usual = sum(plan.system + plan.core for plan in plans)
        self._more = sum(plan.vision - plan.core for plan in plans)

    def count(self, text: float, refreshing: bool, score_only: bool) -> None:
        """Note a step that attends to `text` prompt tokens of text beside the expected ones.

        A refresh that only scores reads keys, half the bytes.
        """
        self.steps += 1
        self.refreshes += refreshing
        share = 0.0 if not refreshing else 0.5 if score_only else 1.0
        self.prompt += self._usual + share * self._more + text


class AdaptiveLayer(SlotLayer):
    """One layer's KV under a policy; see `layout` for the order of its slots.

    At a prompt `update` hands through what is held and what is given; `compact` then scores,
    evicts and lays out. At each decoding step `update` writes the token and returns the views to
    attend to, and `after_step` re-picks the core when the step was a refresh, and forgets text.
    """

    fixed_shapes: bool | None = None  # swap as many slots as could be needed; None: on all but the CPU

    def __init__(self, scorer: Scorer, rule: TextRule) -> None:
        super().__init__()
        self.scorer = scorer
        self.rule = rule
        self.refresh_interval = rule.policy.refresh_interval
        self.score_only = rule.policy.refresh == "score_only"
        self.per_kv_head = rule.policy.heads == "kv_head"
        self._clear()

    def _clear(self) -> None:
        self.reads = Reads()
        self.plans: list[RowPlan] = []
        self.text = TextPart(self.rule)
        self._spans: list[tuple[int, int]] = []
        self._left = self._step = 0
        self._windows = Windows([], 0)
        self._core: CoreSlots | None = None
        self._has_core = self.refreshing = False
        self._view = (0, 0)
        self._mask: Tensor | None = None
        self.claimed: list[int] = []
        self.fixed: Tensor | None = None

    def reset(self) -> None:
        super().reset()
        self._clear()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take `[B, Hkv, q, D]`; returns the keys and values this step attends to.

        One token behind the prompt is a step; more are a further turn, which attends to all that
        is held.
        """
        new = key_states.shape[2]
        if not self.plans:
            self.lazy_initialization(key_states, value_states)
            self.seen += new
            return key_states, value_states
        if new > 1:
            self.seen += new
            keys, values, _ = self.buffers
            end = self._left + max(self.text.counts)
            key_states = torch.cat([keys[:, :, :end], key_states], dim=2)
            return key_states, torch.cat([values[:, :, :end], value_states], dim=2)
        if self.fixed is None:
            self.advance()
        position = self.seen - 1 if self.fixed is None else self.fixed
        self.write(self._windows.slot(self.claimed, self.device), key_states, value_states, position)
        self._view, self._mask = self._window(self.refreshing and not self.score_only)
        start, end = self._view
        keys, values, _ = self.buffers
        return keys.narrow(2, start, end - start), values.narrow(2, start, end - start)

    def advance(self) -> None:
        """Count one more token: what kind of step it is, where each row's token goes, and what is read.

        All that a step does on the host is here; `update` does it unless shapes are `fixed`.
        """
        self._step += 1
        self.refreshing = self._has_core and self._step % self.refresh_interval == 0
        self.claimed = [self.text.claim(row) for row in range(len(self.plans))]
        more = self.grow_for(self._left + max(self.claimed))
        if more:
            self.text.grow(more)
            self._windows.forget_masks()
        self.seen += 1
        self.reads.count(self.text.count_read(), self.refreshing, self.score_only)

    def fix(self, ahead: int, slots: Tensor, position: Tensor) -> None:
        """Give the coming steps, `ahead` or more, the same shapes: they differ by what the device holds.

        From now on someone else calls `advance` before each step, and puts the slots that are `claimed`,
        counted from the text part on, into `slots [B, 1, 1]` (see `slot_numbers`) and the token's logical
        position into `position [1]`. Call it after `advance`; once a step needs more, again.
        """
        counts = self.text.counts
        limits = [count + ahead for count in counts]
        if not self.rule.grows:
            limits = [min(a, most) for a, (most, _) in zip(limits, self.text.rooms(), strict=True)]
        self.grow_for(self._left + max(limits) - 1, exactly=True)
        self._windows = FixedWindows(self.plans, self._left, counts, max(limits), slots)
        if self._has_core and self._core is None:
            self._core = CoreSlots.of(self.plans, self._classes(self._left))
        self.fixed, self.fixed_shapes = position, True

    @property
    def fits(self) -> bool:
        """Whether the tokens claimed lie within the fixed shapes."""
        windows = self._windows
        return isinstance(windows, FixedWindows) and max(self.claimed) < windows.width

    @property
    def slot_numbers(self) -> list[int]:
        """The slot of each row's token."""
        return [self._left + slot for slot in self.claimed]

    def taken(self, call: AttentionCall, modality: Tensor, positions: Tensor) -> Turn:
        """The turn that `update` was handed: `modality [B, q]`, logical `positions [B, 1, q]`."""
        if self.positions is None:
            held = positions[..., :0]
            return Turn.taken(call, modality, positions, held, held.bool())
        width = call.key.shape[2] - call.query.shape[2]
        present = self._classes(width) != PADDING
        return Turn.taken(call, modality, positions, self.positions[..., :width], present)

    def compact(
        self, turn: Turn, call: AttentionCall, positions: Tensor, plans: list[RowPlan], seen: tuple[int, int]
    ) -> None:
        """Score the new tokens, keep what the plans say beside what is held, and free the rest.

        Ties are broken towards the lower position.

        Args:
            turn: the new tokens.
            call: its keys and values are those of the held slots and of the new tokens.
            positions: `[B, 1, N]` logical positions of the new tokens.
            plans: what each row keeps of the new tokens.
            seen: logical positions before and after the turn.
        """
        heads = turn.key.shape[1]
        by_vision, by_text = heads if self.per_kv_head else 1, heads if self.rule.heads_apart else 1
        groups = max(by_vision, by_text)
        old = self._classes(turn.held) if turn.held else positions[..., :0]
        before = self.positions[..., : turn.held] if self.positions is not None else positions[..., :0]
        places = torch.cat([before.expand(-1, groups, -1), positions.expand(-1, groups, -1)], dim=-1)
        scores = self.scorer.score(turn)
        cores = [plan.core for plan in plans]
        if self.plans:
            cores = [plan.core + core for plan, core in zip(self.plans, cores, strict=True)]
        kept = [plan.vision for plan in plans]
        vision = vision_classes(turn, group_mean(scores, by_vision), old, places[:, :by_vision], kept, cores)
        text, counts, running = text_choice(
            turn, group_mean(scores, by_text), old, places[:, :by_text], self.text, plans, self._left
        )
        system = torch.cat([old == SYSTEM, (turn.modality == Modality.SYSTEM)[:, None]], dim=-1)
        classes = torch.where(system, SYSTEM, torch.where(text, TEXT, vision)).expand(-1, groups, -1)
        self.plans = merged(self.plans, plans, counts)
        self._left, most = max(p.system + p.vision for p in self.plans), max(counts)
        parts = (left_order(classes, places, self._left), text_order(classes, places, most))
        order, room = torch.cat(parts, dim=-1), self.text.reserve(most)
        self.fill(call.key, call.value, places, order, room)
        self._spans.append(seen)
        self.seen, self._step = seen[1], 0
        if running is not None:
            running = pad(running.gather(-1, parts[1]), (0, room))
        self.text.lay(counts, places.gather(-1, parts[1]), self._spans, running)
        self._plan()

    def _plan(self) -> None:
        """Work out once what all steps until the next turn need."""
        self.reads.expect(self.plans)
        self.fixed = None
        self._windows, self._core = Windows(self.plans, self._left), None
        smaller = any(plan.core < plan.vision for plan in self.plans)
        self._has_core = smaller and self.refresh_interval > 0

    @property
    def weighing(self) -> bool:
        """Whether the current step's weights are wanted afterwards: a refresh, or text stays by score."""
        return self.rule.running is not None or (self.refreshing and not self.score_only)

    def before_step(self, query: Tensor, scaling: float, softcap: float | None) -> None:
        """At a refresh step that only scores, re-pick the core before `query [B, H, 1, D]` attends to it."""
        if self.refreshing and self.score_only:
            (start, end), mask = self._window(True)
            self._pick(step_weights(query, self.buffers[0][:, :, start:end], scaling, mask, softcap), start)

    def after_step(self, weights: Tensor) -> None:
        """Re-pick the core at a refresh step, and forget text, by its `weights [B, H, n]` of the view."""
        (start, end), (keys, values, positions) = self._view, self.buffers
        if self.refreshing and not self.score_only:
            self._pick(weights, start)
        if self.rule.running is not None:
            own = group_mean(weights[..., self._left - start :], positions.shape[1])
            part = slice(self._left, end)
            self.text.forget(own, (keys[:, :, part], values[:, :, part], positions[..., part]), self._spans)

    def _pick(self, weights: Tensor, start: int) -> None:
        """Choose the core anew by weights `[B, H, n]` of the slots from `start` on."""
        if self._core is None:
            self._core = CoreSlots.of(self.plans, self._classes(self._left))
        positions = self.buffers[2]
        groups = self.buffers[0].shape[1] if self.per_kv_head else 1
        new = self._core.best(weights[..., : self._left - start], positions[..., : self._left], groups)
        on_device = positions.device.type != "cpu"
        self._core.exchange(new, self.buffers, on_device if self.fixed_shapes is None else self.fixed_shapes)

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        if self.positions is not None:
            picked = rows.tolist()
            self.plans = [self.plans[row] for row in picked]
            self.text.select_rows(picked, rows.to(self.positions.device))
            self._plan()

    def allocated_bytes(self) -> int:
        """Bytes of the storage behind keys, values, the slots' positions and their scores."""
        return super().allocated_bytes() + self.text.allocated_bytes()

    def stored_tokens(self) -> list[int]:
        """Tokens of each row in memory, prompt and generated."""
        return [p.system + p.vision + text for p, text in zip(self.plans, self.text.counts, strict=True)]

    def prompt_slots(self) -> list[int]:
        """Prompt tokens of each row in memory, summed over KV heads, which may hold different ones."""
        heads = self.buffers[0].shape[1]
        own = self.text.prompt_slots(heads)
        return [(p.system + p.vision) * heads + text for p, text in zip(self.plans, own, strict=True)]

    def stored_prompt_tokens(self) -> list[int]:
        """Prompt tokens of each row in memory, a mean over KV heads rounded down."""
        heads = self.buffers[0].shape[1]
        return [slots // heads for slots in self.prompt_slots()]

    def prompt_reads(self) -> float:
        """Prompt tokens attended to while decoding, summed over rows and steps."""
        counted = self.text.given_read
        return self.reads.prompt + (float(counted) if counted is not None else 0.0)

    def vision_positions(self, row: int) -> tuple[Tensor, Tensor]:
        """Positions of a row's kept and core vision tokens, `[G, kept]` and `[G, core]`."""
        plan, positions = self.plans[row], self.buffers[2]
        end = self._left - plan.system
        held = positions[row] if self.per_kv_head else positions[row, :1]
        return held[:, end - plan.vision : end], held[:, end - plan.core : end]

    def text_positions(self, row: int) -> Tensor:
        """Positions of a row's text and generated tokens that are held, `[G, count]`."""
        positions = self.buffers[2]
        held = positions[row] if self.rule.heads_apart else positions[row, :1]
        return held[:, self._left : self._left + self.text.counts[row]]

    def attended(self) -> tuple[Tensor, Tensor | None]:
        """Logical positions `[B, G, n]` of the current view's slots, and its mask."""
        start, end = self._view
        return self.buffers[2][..., start:end], self._mask

    def _classes(self, width: int) -> Tensor:
        return slot_classes(self.plans, self.text.counts, self._left, width, self.device)

    def _window(self, whole: bool) -> tuple[tuple[int, int], Tensor | None]:
        """The slots that a step attends to, from and to, and a mask if rows differ; `whole`: all vision."""
        counts, capacity = self.text.counts, self.buffers[2].shape[-1]
        span = self._windows.span(counts, whole)
        return span, self._windows.mask(counts, whole, capacity, self.device)
