"""A layer's KV under a policy: what stays after a prompt or turn, and what each decoding step attends to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from avlprof.attention.call import AttentionCall, StepStates
from avlprof.attention.weights import group_mean
from avlprof.policy import FULL
from avlprof.runtime.buckets import FixedBuffers
from avlprof.runtime.cored import CoredLayer
from avlprof.runtime.eviction import Candidates, CoreSlots, kept_order
from avlprof.runtime.layout import PADDING, RowPlan, merged
from avlprof.runtime.packed import StoredBits
from avlprof.runtime.step import Step
from avlprof.runtime.text_part import TextRule
from avlprof.runtime.turns import TurnPrefill
from avlprof.runtime.windows import FixedWindows, Windows
from avlprof.scorers import Scorer


class AdaptiveLayer(CoredLayer):
    """One layer's KV under a policy; see `layout` for the order of its slots.

    At a prompt or further turn: `update` hands through what is held and what is new, `turn_for` says
    what competes, and `compact` scores, evicts and lays out. At a decoding step: `update` begins a
    `Step` by `advance`, writes the token and returns the views to attend to, `step_for` hands the step
    to whoever computes the attention, and `after` picks the core anew and lets text go.
    """

    def __init__(self, scorer: Scorer, rule: TextRule, keeps_all: bool = False) -> None:
        """`keeps_all`: a first prompt stays as a whole, so that nothing need be ranked."""
        super().__init__(rule)
        self.keeps_all = keeps_all
        self.scorer = scorer
        self._clear()

    def _clear(self) -> None:
        self.step: Step | None = None
        self.fixed: FixedBuffers | None = None
        self._spans: list[tuple[int, int]] = []
        self.forget_core()

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
            held = [*(part.decoded() for part in (self.words, self.stored) if part is not None), *held]
            keys, values = (torch.cat(parts, dim=2) for parts in zip(*held, strict=True))
            return keys, values
        step = self.advance() if self.fixed is None else self._present
        position = self.seen - 1 if self.fixed is None else self.fixed.position
        self.write(self._windows.slot(step.slots, self.device), key_states, value_states, position)
        keys, values, _ = self.buffers
        count = step.end - step.start
        return keys.narrow(2, step.start, count), values.narrow(2, step.start, count)

    def advance(self) -> Step:
        """Count one more token: what kind of step it is, where each row's token goes, and what is read.

        All that a step does on the host is here; `update` does it unless shapes are `fixed`.
        """
        refreshing = self.count_step()
        slots = [self.text.claim(row) for row in range(len(self.plans))]
        more = self.grow_for(self._left + max(slots)) if self.fixed is None else 0
        if more:
            self.text.grow(more)
            self._windows.forget_masks()
        self.seen += 1
        self.reads.count(self.text.count_read(), refreshing and self._has_core, self.refresh_reads)
        self.step = self._step(slots, refreshing)
        return self.step

    def move(self, fixed: FixedBuffers) -> None:
        """Go on in fixed buffers, where coming steps have the same shapes: they differ by what these hold.

        From now on someone else calls `advance` before each step, and puts the slots of its step (see
        `slot_numbers`) and the token's logical position into what `fixed` has for them. Call it after
        `advance`; once a step does not `fit`, again with longer ones.
        """
        with torch.no_grad():
            end = self._left + max(self.text.counts)
            self.keys, self.values, self.positions = fixed.take_over(self.buffers, self._left, end)
        self._left = fixed.extents.left
        self._settle(fixed)
        if self.step is not None:
            self.step = self._step(self.step.slots, self.step.refreshing)

    def _settle(self, fixed: FixedBuffers) -> None:
        """Steps from now on are those of fixed buffers, which hold the layer's content."""
        windows = FixedWindows(self._full, fixed.extents, fixed.held)
        with torch.no_grad():
            windows.refill(self.text.counts)
            for name, part in (("words", self.words), ("stored", self.stored)):
                setattr(self, name, fixed.stored_like(name, part) if isinstance(part, StoredBits) else None)
            if fixed.extents.core is not None:
                classes = self._classes(self._first + self._left)
                self._core = fixed.core_like(CoreSlots.of(self.plans, classes, fixed.extents.core))
        self._windows, self.fixed, self.fixed_shapes = windows, fixed, True

    def loosen(self) -> None:
        """Steps from now on are ordinary ones, in the buffers as they are."""
        self._windows, self._core, self.fixed = Windows(self._full, self._left), None, None

    @property
    def fits(self) -> bool:
        """Whether the present step's tokens lie within fixed buffers."""
        windows = self._windows
        return isinstance(windows, FixedWindows) and windows.fit(self._present.slots)

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
        classes, before = self._turn_slots(width)
        return TurnPrefill.behind(call, modality, positions, before, classes != PADDING)

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
        counts, heads = self.text.extend(turn.text_counts, [plan.text for plan in plans]), turn.key.shape[1]
        groups = heads if self.per_kv_head else 1, heads if self.rule.heads_apart else 1
        candidates = self._candidates(turn, positions, max(groups))
        scores = None if self.keeps_all and not self.plans else self.scorer.score(turn)
        # 2 choose: vision by the counts of the plans, text by its rule; what is in neither part goes
        fixed = None if self.plans else self.fixed  # a turn's content moves there with its first step
        after, most = merged(self.plans, plans, counts), max(counts)
        full = [replace(plan, vision=plan.core) for plan in after] if self.packs else after
        left = fixed.extents.left if fixed is not None else max(p.system + p.vision for p in full)
        wide = max(left, *(p.system + p.vision for p in after))
        if self.scores is not None and scores is not None:
            self.scores.extend(group_mean(scores, groups[0]), positions, span[1])
        # 3 lay out: in the order that makes each step's reads one view; what few bits store for itself
        places = (candidates.positions, self._words)
        if self.text_bits < FULL:
            candidates = self._store_words(call, candidates, after)
        order, running, kept = kept_order(candidates, scores, groups, self.text, plans, after, wide)
        if self.packs:
            self._store(call, places, order[..., :wide] if kept is None else kept, after)
        order = order[..., wide - left :]
        self.plans, self._full, self._left = after, full, left
        # 4 free: buffers of what stays replace the old ones, before the next layer makes its own
        room, into = self.text.reserve(most), None
        if fixed is not None:
            room = fixed.extents.text - most
            into = fixed.tensors_for(call.key, call.value, order.shape[1])
        self.fill(call.key, call.value, candidates.positions, order, room, into)
        self._spans.append(span)
        self.seen = span[1]
        self.forget_core()
        if running is not None:
            running = pad(running.gather(-1, order[..., left:]), (0, room))
        text = slice(left, left + most)
        self.text.lay(counts, self.buffers[2][..., text], self._spans, running)
        self._plan(fixed)

    def _candidates(self, turn: TurnPrefill, positions: Tensor, groups: int) -> Candidates:
        classes = self._turn_slots(turn.past)[0] if turn.past else positions[..., :0]
        every = turn.all_positions(positions).expand(-1, groups, -1)
        return Candidates(turn, classes, every, self._words + self._first + self._left)

    def _plan(self, fixed: FixedBuffers | None = None) -> None:
        """Work out once what all steps until the next turn need; `fixed`: the buffers are these."""
        stored, low = (1.0 if part is None else part.share for part in (self.stored, self.words))
        self.reads.expect(self.plans, stored, self.reads_stored, low)
        self.step = None
        self._has_core = self.picks(self.plans)
        self.loosen()
        if fixed is not None:
            self._settle(fixed)

    @property
    def _present(self) -> Step:
        """The step at work."""
        assert self.step is not None
        return self.step

    def _step(self, slots: list[int], refreshing: bool) -> Step:
        """The step of tokens that go to text slots `slots`."""
        whole = refreshing and not self.score_only and self.lead is None
        (start, end), mask, bounds = self._window(whole)
        positions = self.buffers[2][..., start:end]
        scored = self._has_core and self.scores is not None and not refreshing
        weighing = positions.shape[1] if whole or scored or self.rule.running is not None else 0
        stored = self._parts(whole or self.reads_stored)
        return Step(slots, start, end, positions, mask, refreshing, weighing, bounds, stored)

    def step_for(
        self, query: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None = None
    ) -> Step:
        """The step that `update` began, of `query [B, H, 1, D]`.

        One that does not attend to all that is kept picks its core here, before it attends to it.
        """
        step = self._present
        self.pick_ahead(StepStates(query, self.buffers[0], None, scaling, softcap, sinks), step.refreshing)
        return step

    def after(self, step: Step, weights: Tensor) -> None:
        """Pick the core anew at a full refresh, or score it, and let text go, by the step's weights
        `[B, G, n]`."""
        keys, values, positions = self.buffers
        weights = weights[..., self._words :]
        if step.refreshing and not self.score_only:
            self._pick(weights, step.start)
        else:
            self.core_attended(step, weights)
        if self.rule.running is not None:
            own = group_mean(weights[..., weights.shape[-1] - step.end + self._left :], positions.shape[1])
            part = slice(self._left, step.end)
            self.text.forget(own, (keys[:, :, part], values[:, :, part], positions[..., part]), self._spans)

    def select_rows(self, rows: Tensor) -> None:
        fixed = self.fixed if len(rows) == len(self.plans) else None
        super().select_rows(rows)
        if self.positions is not None:
            picked = rows.tolist()
            self.plans, self._full = ([plans[row] for row in picked] for plans in (self.plans, self._full))
            for name, part in (("words", self.words), ("stored", self.stored)):
                setattr(self, name, None if part is None else part.select_rows(rows))
            self.text.select_rows(picked, rows.to(self.positions.device))
            if self.scores is not None:
                self.scores.select_rows(rows.to(self.positions.device))
            self._since = [self._since[row] for row in picked] if self._since else []
            self.held = None if self.held is None else self.held.select_rows(rows)
            self._plan()
            if fixed is not None:
                self.move(fixed)
