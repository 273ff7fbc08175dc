"""A layer's core while decoding: when it is picked anew, by which row, and what other layers are told."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from avlprof.attention.call import Bounds, StepStates
from avlprof.attention.column_sums import kernels_run
from avlprof.attention.decode import attention_weights
from avlprof.attention.weights import group_mean, step_weights
from avlprof.policy import refresh_reads
from avlprof.runtime.eviction import CoreSlots
from avlprof.runtime.held import HeldLayer
from avlprof.runtime.layout import RowPlan
from avlprof.runtime.packed import Stored, StoredBits, stored_weights
from avlprof.runtime.step import Step
from avlprof.runtime.text_part import TextRule
from avlprof.runtime.trigger import Held, leaning
from avlprof.runtime.windows import Windows


@dataclass(frozen=True)
class Told:
    """What a layer tells those that follow it: its row at a refresh.

    `row`, fp32 `[B, 1, P]`, is its attention to the vision tokens at logical positions, the mean over its
    sets, and below 0 where it holds none; `due`, bool `[B]`, are the rows of the batch that refresh (None:
    all).
    """

    row: Tensor
    due: Tensor | None


class CoredLayer(HeldLayer):
    """A layer whose core steps may pick anew: by their own rows, or by those of the layer that it follows.

    `lead` is that layer; a layer that `leads` tells its rows of refreshes. Where refreshes are `triggered`
    each row of the batch has its own: `held` is what is known of its core, None before the first.
    """

    fixed_shapes: bool | None = None  # swap as many slots as could be needed; None: on all but the CPU

    def __init__(self, rule: TextRule) -> None:
        super().__init__(rule)
        policy, layer = rule.policy, rule.layer
        self.refresh_interval = policy.refresh_interval if policy.leader(layer) is not None else 0
        self.score_only = policy.refresh != "full"
        self._refresh_reads = refresh_reads(policy.refresh)
        self.leads = policy.leads(layer)
        self.lead: CoredLayer | None = None
        self.triggered = policy.triggered and policy.leader(layer) == layer
        self._margin = policy.refresh_margin
        self._windows = Windows([], 0)
        self.forget_core()

    def forget_core(self) -> None:
        """As at the beginning of a prompt or turn."""
        self._count = 0
        self._core: CoreSlots | None = None
        self._has_core = False
        self.held: Held | None = None
        self.told: Told | None = None
        self._since: list[int] = []
        self._due: Tensor | None = None
        self.picked = False

    def picks(self, plans: list[RowPlan]) -> bool:
        """Whether steps pick a core anew."""
        cored = self.refresh_interval > 0 and not self.reads_stored
        return cored and any(plan.core < plan.vision for plan in plans)

    def count_step(self) -> bool:
        """Count one more step; whether it refreshes for sure, by its number."""
        self._count += 1
        self.told, self._due, self.picked = None, None, False
        scheduled = self._has_core or self.leads
        if not scheduled or self.triggered or (self.lead is not None and self.lead.triggered):
            return False
        return self._count % self.refresh_interval == 0

    @property
    def refresh_reads(self) -> float:
        """What a refresh that its number says reads of a token that is kept and not core."""
        return 0.0 if self.lead is not None else self._refresh_reads

    def allocated_bytes(self) -> int:
        """Bytes of the storage behind it, what is known of the core between two picks included."""
        told = () if self.told is None else (self.told.row,)
        held = 0 if self.held is None else self.held.allocated_bytes()
        return super().allocated_bytes() + held + sum(part.untyped_storage().nbytes() for part in told)

    def pick_ahead(self, states: StepStates, refreshing: bool) -> None:
        """Pick the core of a step before it attends, if it is time to.

        Args:
            states: the step's query `[B, H, 1, D]`, and how it attends; keys and masks are the layer's own.
            refreshing: its number says so.
        """
        if self.lead is not None:
            self._follow(self.lead.told)
        elif self.triggered:
            self._trigger(states)
        elif refreshing and self.score_only:
            weights, start = self._weighed(states)
            if self.leads:
                self.told = self._said(weights, start, None)
            if self._has_core:
                self._pick(weights, start)

    def _follow(self, told: Told | None) -> None:
        """Pick by the row of the layer that this one follows."""
        if told is None or not self._has_core:
            return
        start = self._window(True)[0][0]
        positions = self._left_positions[:, : self._sets, start:]
        known = pad(told.row, (0, 1), value=-1.0).expand(-1, self._sets, -1)
        row = known.gather(-1, positions.clamp(min=0, max=known.shape[-1] - 1))
        self._pick(row.clamp(min=0.0), start, told.due, row >= 0)

    def _trigger(self, states: StepStates) -> None:
        """Pick in those rows whose core is estimated to have fallen."""
        if not (self._has_core or self.leads):
            return
        batch, _, _, size = states.query.shape
        self._since = [count + 1 for count in self._since or [0] * batch]
        query = states.query.view(batch, self.buffers[0].shape[1], -1, size)
        due = [True] * batch
        if self.held is not None:
            fallen = self.held.fallen(leaning(query, self.held.apart, states.scaling), self._margin).tolist()
            waited = [since >= self.refresh_interval for since in self._since]
            due = [a and b for a, b in zip(fallen, waited, strict=True)]
        if not any(due):
            return
        rows = torch.tensor(due, device=query.device)
        weights, start = self._weighed(states, every_head=True)
        if self.leads:
            self.told = self._said(weights, start, rows)
        by_position = self._by_position(weights, start)
        self._pick(weights, start, rows)
        self._hold(query, states.scaling, by_position, rows)
        self._since = [0 if now else since for now, since in zip(due, self._since, strict=True)]
        self.reads.refresh(due, self._refresh_reads)

    def _hold(self, query: Tensor, scaling: float, weights: Tensor, due: Tensor) -> None:
        """Remember what the new core holds of `weights [B, H, P]` by logical position."""
        slots, heads = self._core_slots, query.shape[1]
        positions = self._left_positions[:, : self._sets].clamp(min=0)
        own = weights.gather(-1, positions.repeat_interleave(weights.shape[1] // positions.shape[1], dim=1))
        on_core, on_rest = (
            (own * part).sum(dim=-1).view(len(own), heads, -1)
            for part in (slots.core, slots.vision & ~slots.core)
        )
        apart = self._mean_keys_apart()
        new = Held.of(on_core, on_rest, apart, leaning(query, apart, scaling))
        self.held = new if self.held is None else self.held.replaced(new, due)

    def _mean_keys_apart(self) -> Tensor:
        """Mean key `[B, Hkv, D]` of the kept vision tokens outside the core, less that of the core."""
        slots, stored = self._core_slots, self.stored
        vision, core = (part[..., self._first :].unsqueeze(-2).float() for part in (slots.vision, slots.core))
        keys = self.buffers[0][:, :, : self._left].float()
        inside, outside = (core @ keys).squeeze(-2), ((vision - core) @ keys).squeeze(-2)
        if isinstance(stored, StoredBits):
            outside = outside + stored.key_sum()
        counts = slots.core.sum(dim=-1, keepdim=True), slots.vision.sum(dim=-1, keepdim=True)
        return outside / (counts[1] - counts[0]).clamp(min=1) - inside / counts[0].clamp(min=1)

    def _by_position(self, weights: Tensor, start: int) -> Tensor:
        """Weights `[B, G, m]` of the slots from `start` on, on vision tokens by logical position; else -1."""
        vision = self._core_slots.vision[..., start:]
        weights = weights[..., : vision.shape[-1]]
        positions = self._left_positions[:, : self._sets, start:]
        positions = positions.repeat_interleave(weights.shape[1] // positions.shape[1], dim=1)
        reach = self._windows.reach(self.seen)
        index = torch.where(vision, positions, reach)
        blank = weights.new_full((*weights.shape[:2], reach + 1), -1.0)
        return blank.scatter(-1, index, weights.masked_fill(~vision, -1.0))

    def _said(self, weights: Tensor, start: int, due: Tensor | None) -> Told:
        """What followers are told of weights `[B, G, m]`."""
        rows = self._by_position(group_mean(weights, self._sets), start)
        held = (rows >= 0).any(dim=1, keepdim=True)
        return Told(rows.clamp(min=0.0).mean(dim=1, keepdim=True).masked_fill(~held, -1.0), due)

    def _weighed(self, states: StepStates, every_head: bool = False) -> tuple[Tensor, int]:
        """The step's weights `[B, G, m]` on all that is held, from the slot that is given back on.

        They are of all heads, or of sets where kernels give these (never with `every_head`).
        """
        (start, end), mask, bounds = self._window(True)
        keys, parts = self.buffers[0][:, :, start:end], self._parts(True)
        states = states._replace(key=keys, value=None, mask=mask, bounds=bounds)
        how = states.scaling, mask, states.softcap, states.sinks
        if parts:
            return stored_weights(parts, states.query, keys, *how)[..., self._words :], start
        if every_head:
            return step_weights(states.query, keys, *how), start
        return attention_weights(states, self.buffers[2].shape[1]), start

    def core_attended(self, step: Step, weights: Tensor) -> None:
        """Count the weights `[B, G, n]` of a step to the core, where scores run and none was picked by it."""
        if self.scores is None or not self._has_core or step.refreshing:
            return
        row = group_mean(weights[..., : self._left - step.start], self._sets)
        core = self._core_slots.core[..., self._first + step.start :]
        if self._due is not None:
            core = core & ~self._due[:, None, None]
        elif self.picked:
            return
        self.scores.add(row, self.buffers[2][:, : self._sets, step.start : self._left], core)

    def _pick(
        self, weights: Tensor, start: int, due: Tensor | None = None, seen: Tensor | None = None
    ) -> None:
        """Choose the core anew by weights `[B, G, n]` of the slots from `start` on.

        Args:
            due: bool `[B]`, the rows in which it is; None: all.
            seen: bool `[B, G, n]`, the slots whose weights count; None: all vision.
        """
        core, groups = self._core_slots, self._sets
        fixed = self.device.type != "cpu" if self.fixed_shapes is None else self.fixed_shapes
        weights = weights[..., : self._first + self._left - start]
        if self.scores is not None:
            vision = core.vision[..., start:]
            counted = vision if seen is None else vision & seen
            counted = counted if due is None else counted & due[:, None, None]
            positions = self._left_positions[:, :groups, start:]
            self.scores.add(group_mean(weights, groups), positions, counted)
            weights = self.scores.of(positions, vision)
        if due is not None:  # what is core already ranks first where nothing is due
            stays = core.core[..., start:].to(weights.dtype)
            weights = torch.where(due[:, None, None], group_mean(weights, groups), stays)
        stored = self.stored if self._first and isinstance(self.stored, StoredBits) else None
        core.refresh(weights, start, self.buffers, groups, fixed, stored)
        self.picked, self._due = True, due

    @property
    def _left_positions(self) -> Tensor:
        """Logical positions `[B, G, n]` of all slots before the text part."""
        return self._positions(self._first + self._left)

    @property
    def _core_slots(self) -> CoreSlots:
        """Where core and stored vision lie, worked out when first asked for."""
        if self._core is None:
            self._core = CoreSlots.of(self.plans, self._classes(self._first + self._left))
        return self._core

    @property
    def _sets(self) -> int:
        """Sets of vision tokens: 1, or one a KV head."""
        return self.buffers[0].shape[1] if self.per_kv_head else 1

    def _parts(self, whole: bool) -> tuple[Stored, ...]:
        """What a step reads in few bits before its slots: words, and all vision of a `whole` one."""
        parts = (self.words, self.stored if whole else None)
        return tuple(part for part in parts if part is not None and part.width)

    def _window(self, whole: bool) -> tuple[tuple[int, int], Tensor | None, Bounds | None]:
        """The slots that a step attends to, from and to; a mask if rows differ, and where kernels run the
        same as bounds. `whole`: all vision."""
        counts, positions = self.text.counts, self.buffers[2]
        span = self._windows.span(counts, whole)
        mask = self._windows.mask(counts, whole, positions.shape[-1], self.device)
        runs = kernels_run(positions)
        return span, mask, self._windows.bounds(counts, whole, self.device) if runs else None
