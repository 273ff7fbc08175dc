"""A layer's KV under a policy: what stays after a prompt or turn, and what each decoding step attends to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from avlprof.attention.call import AttentionCall
from avlprof.attention.weights import group_mean, step_weights
from avlprof.policy import FULL
from avlprof.runtime.eviction import Candidates, CoreSlots, merged, text_choice, vision_choice
from avlprof.runtime.held import HeldLayer
from avlprof.runtime.layout import (
    PADDING,
    STORED,
    SYSTEM,
    TEXT,
    FixedWindows,
    RowPlan,
    Windows,
    left_order,
    text_order,
)
from avlprof.runtime.packed import StoredBits
from avlprof.runtime.step import Step
from avlprof.runtime.text_part import TextRule
from avlprof.runtime.turns import TurnPrefill
from avlprof.scorers import Scorer


class AdaptiveLayer(HeldLayer):
    """One layer's KV under a policy; see `layout` for the order of its slots.

    At a prompt or further turn: `update` hands through what is held and what is new, `turn_for` says
    what competes, and `compact` scores, evicts and lays out. At a decoding step: `update` begins a
    `Step` by `advance`, writes the token and returns the views to attend to, `step_for` hands the step
    to whoever computes the attention, and `after` picks the core anew and lets text go.
    """

    fixed_shapes: bool | None = None  # swap as many slots as could be needed; None: on all but the CPU

    def __init__(self, scorer: Scorer, rule: TextRule) -> None:
        super().__init__(rule)
        self.scorer = scorer
        self.refresh_interval = rule.policy.refresh_interval
        self.score_only = rule.policy.refresh == "score_only"
        self._clear()

    def _clear(self) -> None:
        self.step: Step | None = None
        self.fixed: Tensor | None = None
        self._spans: list[tuple[int, int]] = []
        self._count = 0
        self._windows = Windows([], 0)
        self._core: CoreSlots | None = None
        self._has_core = False

    def reset(self) -> None:
        super().reset()
        self.hold_nothing()
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
            end = self._left + max(self.text.counts)
            held = [tuple(part[:, :, :end] for part in self.buffers[:2]), (key_states, value_states)]
            if self.stored is not None:
                held.insert(0, self.stored.decoded())
            keys, values = (torch.cat(parts, dim=2) for parts in zip(*held, strict=True))
            return keys, values
        step = self.advance() if self.fixed is None else self._present
        position = self.seen - 1 if self.fixed is None else self.fixed
        self.write(self._windows.slot(step.slots, self.device), key_states, value_states, position)
        keys, values, _ = self.buffers
        count = step.end - step.start
        return keys.narrow(2, step.start, count), values.narrow(2, step.start, count)

    def advance(self) -> Step:
        """Count one more token: what kind of step it is, where each row's token goes, and what is read.

        All that a step does on the host is here; `update` does it unless shapes are `fixed`.
        """
        self._count += 1
        refreshing = self._has_core and self._count % self.refresh_interval == 0
        slots = [self.text.claim(row) for row in range(len(self.plans))]
        more = self.grow_for(self._left + max(slots))
        if more:
            self.text.grow(more)
            self._windows.forget_masks()
        self.seen += 1
        self.reads.count(self.text.count_read(), refreshing, self.score_only)
        self.step = self._step(slots, refreshing)
        return self.step

    def fix(self, ahead: int, slots: Tensor, position: Tensor) -> None:
        """Give the coming steps, `ahead` or more, the same shapes: they differ by what the device holds.

        From now on someone else calls `advance` before each step, and puts the slots of its step,
        counted from the buffer's first (see `slot_numbers`), into `slots [B, 1, 1]` and the token's
        logical position into `position [1]`. Call it after `advance`; once a step needs more, again.
        """
        counts = self.text.counts
        limits = [count + ahead for count in counts]
        if not self.rule.grows:
            limits = [min(a, most) for a, (most, _) in zip(limits, self.text.rooms(), strict=True)]
        self.grow_for(self._left + max(limits) - 1, exactly=True)
        self._windows = FixedWindows(self._full, self._left, counts, max(limits), slots)
        if self._has_core and self._core is None:
            self._core = CoreSlots.of(self.plans, self._classes(self._first + self._left))
        self.fixed, self.fixed_shapes = position, True
        self.step = self._step(self._present.slots, self._present.refreshing)

    @property
    def fits(self) -> bool:
        """Whether the present step's tokens lie within the fixed shapes."""
        windows = self._windows
        return isinstance(windows, FixedWindows) and max(self._present.slots) < windows.width

    @property
    def changing(self) -> list[Tensor]:
        """What the present step changes in a way that its being run again would change anew.

        A core that is picked again stays, but few bits lose something each time that a token leaves it.
        """
        if self.stored is None or not self._present.refreshing:
            return []
        return [*self.buffers, *self.stored.parts]

    @property
    def slot_numbers(self) -> list[int]:
        """The slot of each row's token, counted from the buffer's first."""
        return [self._left + slot for slot in self._present.slots]

    def turn_for(self, call: AttentionCall, modality: Tensor, positions: Tensor) -> TurnPrefill:
        """The turn that `update` was handed: `modality [B, q]`, logical `positions [B, 1, q]`."""
        if self.positions is None:
            none = positions[..., :0]
            return TurnPrefill.behind(call, modality, positions, none, none.bool())
        width = call.key.shape[2] - call.query.shape[2]
        present = self._classes(width) != PADDING
        return TurnPrefill.behind(call, modality, positions, self._positions(width), present)

    def compact(
        self,
        turn: TurnPrefill,
        call: AttentionCall,
        positions: Tensor,
        plans: list[RowPlan],
        span: tuple[int, int],
    ) -> None:
        """Score the new tokens, keep what the plans say beside what is held, and free the rest.

        Ties are broken towards the lower position.

        Args:
            turn: the new tokens.
            call: its keys and values are those of the held slots and of the new tokens.
            positions: `[B, 1, N]` logical positions of the new tokens.
            plans: what each row keeps of the new tokens.
            span: logical positions before and after the turn.
        """
        # 1 score: the new tokens, by the scorer; held vision stays, held text has running scores or an age
        scores = self.scorer.score(turn)
        heads = turn.key.shape[1]
        by_vision, by_text = heads if self.per_kv_head else 1, heads if self.rule.heads_apart else 1
        candidates = self._candidates(turn, positions, max(by_vision, by_text))
        # 2 choose: vision by the counts of the plans, text by its rule; then each token has one class
        cores = [plan.core for plan in plans]
        if self.plans:
            cores = [plan.core + core for plan, core in zip(self.plans, cores, strict=True)]
        kept = [plan.vision for plan in plans]
        vision = vision_choice(candidates, group_mean(scores, by_vision), kept, cores)
        counts = self.text.extend(turn.text_counts, [plan.text for plan in plans])
        text, running = text_choice(candidates, group_mean(scores, by_text), self.text, plans, counts)
        classes = torch.where(candidates.system, SYSTEM, torch.where(text, TEXT, vision))
        classes = classes.expand(-1, candidates.positions.shape[1], -1)
        # 3 lay out: what few bits store, and the rest in the order that makes each step's reads one view;
        # what is in neither goes
        self.plans = merged(self.plans, plans, counts)
        known = None if candidates.in_order else candidates.positions
        if self.bits < FULL:
            classes = self._store(call, candidates.positions, classes, known)
        self._full = self.plans if self.bits == FULL else [replace(p, vision=p.core) for p in self.plans]
        self._left, most = max(p.system + p.vision for p in self._full), max(counts)
        text_slots = text_order(classes, known, most)
        order = torch.cat([left_order(classes, known, self._left), text_slots], dim=-1)
        # 4 free: buffers of what stays replace the old ones, before the next layer makes its own
        room = self.text.reserve(most)
        self.fill(call.key, call.value, candidates.positions, order, room)
        self._spans.append(span)
        self.seen, self._count = span[1], 0
        if running is not None:
            running = pad(running.gather(-1, text_slots), (0, room))
        self.text.lay(counts, candidates.positions.gather(-1, text_slots), self._spans, running)
        self._plan()

    def _store(self, call: AttentionCall, positions: Tensor, classes: Tensor, known: Tensor | None) -> Tensor:
        """Store kept vision outside the core in few bits; the classes of what is left for the buffers."""
        outside = classes == STORED
        counts = [plan.vision - plan.core for plan in self.plans]
        order = left_order(classes.masked_fill(~outside, PADDING), known, max(counts))
        self.stored = StoredBits.of(call.key, call.value, positions, order, counts, self.stored, self.bits)
        return classes.masked_fill(outside, PADDING)

    def _candidates(self, turn: TurnPrefill, positions: Tensor, groups: int) -> Candidates:
        classes = self._classes(turn.past) if turn.past else positions[..., :0]
        return Candidates(
            turn, classes, turn.all_positions(positions).expand(-1, groups, -1), self._first + self._left
        )

    def _plan(self) -> None:
        """Work out once what all steps until the next turn need."""
        self.reads.expect(self.plans, 1.0 if self.stored is None else self.stored.share, self.reads_stored)
        self.step = self.fixed = None
        self._windows, self._core = Windows(self._full, self._left), None
        smaller = any(plan.core < plan.vision for plan in self.plans) and not self.reads_stored
        self._has_core = smaller and self.refresh_interval > 0

    @property
    def _present(self) -> Step:
        """The step at work."""
        assert self.step is not None
        return self.step

    def _step(self, slots: list[int], refreshing: bool) -> Step:
        """The step of tokens that go to text slots `slots`."""
        whole = refreshing and not self.score_only
        (start, end), mask = self._window(whole)
        positions = self.buffers[2][..., start:end]
        weighing = whole or self.rule.running is not None
        stored = self.stored if self._first and (whole or self.reads_stored) else None
        return Step(slots, start, end, positions, mask, refreshing, weighing, stored)

    def step_for(
        self, query: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None = None
    ) -> Step:
        """The step that `update` began, of `query [B, H, 1, D]`.

        One that only scores picks its core here, before it attends to it.
        """
        step = self._present
        if step.refreshing and self.score_only:
            (start, end), mask = self._window(True)
            keys = self.buffers[0][:, :, start:end]
            if self.stored is None:
                weights = step_weights(query, keys, scaling, mask, softcap, sinks)
            else:
                weights = self.stored.weights(query, keys, scaling, mask, softcap, sinks)
            self._pick(weights, start)
        return step

    def after(self, step: Step, weights: Tensor) -> None:
        """Pick the core anew at a full refresh, and let text go, by the step's weights `[B, H, n]`."""
        keys, values, positions = self.buffers
        if step.refreshing and not self.score_only:
            self._pick(weights, step.start)
        if self.rule.running is not None:
            own = group_mean(weights[..., weights.shape[-1] - step.end + self._left :], positions.shape[1])
            part = slice(self._left, step.end)
            self.text.forget(own, (keys[:, :, part], values[:, :, part], positions[..., part]), self._spans)

    def _pick(self, weights: Tensor, start: int) -> None:
        """Choose the core anew by weights `[B, H, n]` of the slots from `start` on."""
        width = self._first + self._left
        if self._core is None:
            self._core = CoreSlots.of(self.plans, self._classes(width))
        groups = self.buffers[0].shape[1] if self.per_kv_head else 1
        new = self._core.best(weights[..., : width - start], self._positions(width), groups)
        fixed = self.device.type != "cpu" if self.fixed_shapes is None else self.fixed_shapes
        self._core.exchange(new, self.buffers, fixed, self.stored if self._first else None)

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        if self.positions is not None:
            picked = rows.tolist()
            self.plans = [self.plans[row] for row in picked]
            self._full = [self._full[row] for row in picked]
            if self.stored is not None:
                self.stored = self.stored.select_rows(rows)
            self.text.select_rows(picked, rows.to(self.positions.device))
            self._plan()

    def _window(self, whole: bool) -> tuple[tuple[int, int], Tensor | None]:
        """The slots that a step attends to, from and to, and a mask if rows differ; `whole`: all vision."""
        counts, capacity = self.text.counts, self.buffers[2].shape[-1]
        span = self._windows.span(counts, whole)
        return span, self._windows.mask(counts, whole, capacity, self.device)
