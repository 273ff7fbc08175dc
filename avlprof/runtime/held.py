"""What a layer under a policy holds: in which slots, and in how many bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from avlprof.attention.call import AttentionCall
from avlprof.policy import FULL, PromptShape
from avlprof.runtime.buffers import SlotLayer
from avlprof.runtime.core_scores import CoreScores
from avlprof.runtime.eviction import Candidates
from avlprof.runtime.layout import PADDING, SYSTEM, TEXT, RowPlan, per_row, slot_classes
from avlprof.runtime.packed import StoredBits
from avlprof.runtime.ragged import RaggedHeads
from avlprof.runtime.step import LayerUse, Reads
from avlprof.runtime.text_part import TextPart, TextRule


class HeldLayer(SlotLayer):
    """Slots of a layer, counted from those that are `stored` beside the buffers on to those of the buffers.

    `words` are system and prompt text in few bits, read at every step; they have slots of their own.
    `plans` say what each row holds, `_full` what of it the buffers hold, whose text begins at slot `_left`
    of theirs. What is stored beside them are vision tokens in few bits, or of heads that differ in how many
    they keep; without either the two are the same.
    """

    def __init__(self, rule: TextRule) -> None:
        super().__init__()
        self.rule = rule
        self.per_kv_head = rule.policy.heads != "shared"
        self.bits = rule.policy.bits(rule.layers)[rule.layer]
        self.text_bits = rule.policy.text_bits(rule.layers)[rule.layer]
        self.packs = self.bits < FULL or rule.policy.heads == "adaptive"
        self.reads_stored = self.packs and rule.policy.vision_compute is None
        self.hold_nothing()

    def hold_nothing(self) -> None:
        """As before the first prompt."""
        self.reads = Reads()
        self.plans: list[RowPlan] = []
        self.stored: StoredBits | RaggedHeads | None = None
        self.words: StoredBits | None = None
        self.text = TextPart(self.rule)
        policy = self.rule.policy
        self.scores = CoreScores(policy.core_score) if policy.scores_core else None
        self._full: list[RowPlan] = []
        self._left = 0

    def allocated_bytes(self) -> int:
        """Bytes of the storage behind keys, values, the slots' positions and their scores."""
        stored = sum(part.allocated_bytes() for part in (self.words, self.stored) if part is not None)
        scores = 0 if self.scores is None else self.scores.allocated_bytes()
        return super().allocated_bytes() + self.text.allocated_bytes() + stored + scores

    def stored_tokens(self) -> list[int]:
        """Tokens of each row in memory, prompt and generated."""
        texts = zip(self.plans, self.text.counts, strict=True)
        return [p.low + p.system + p.vision + text for p, text in texts]

    def prompt_slots(self) -> list[int]:
        """Prompt tokens of each row in memory, summed over KV heads, which may hold different ones."""
        heads = self.buffers[0].shape[1]
        own = self.text.prompt_slots(heads)
        texts = zip(self.plans, own, strict=True)
        return [(p.low + p.system + p.vision) * heads + text for p, text in texts]

    def prompt_bytes(self, rows: Sequence[PromptShape] = ()) -> list[int]:
        """Bytes of each row's prompt tokens in memory; the layer counts them itself."""
        size, heads = self.bytes_per_token(), self.buffers[0].shape[1]
        slots = zip(self.prompt_slots(), self._spared(), strict=True)
        return [count * size // heads - spared for count, spared in slots]

    def _spared(self) -> list[int]:
        """Bytes of each row that few bits spare."""
        spared, size = [0.0] * len(self.plans), self.bytes_per_token()
        for part in (self.words, self.stored):
            if part is not None:
                each = (1.0 - part.share) * size
                spared = [sum_ + count * each for sum_, count in zip(spared, part.counts, strict=True)]
        return [round(sum_) for sum_ in spared]

    def use(self, layer: int, rows: Sequence[PromptShape], length: int) -> LayerUse:
        """Measured use of this layer, number `layer`, of prompts `rows`."""
        size = self.bytes_per_token()
        counted = self.text.prompt_read
        read = self.reads.prompt + (float(counted) if counted is not None else 0.0)
        return LayerUse(
            layer=layer,
            prompt=sum(self.prompt_bytes()),
            live=sum(self.stored_tokens()) * size - sum(self._spared()),
            allocated=self.allocated_bytes(),
            dense_prompt=sum(shape.total for shape in rows) * size,
            read=read / max(self.reads.steps, 1) * size,
            refreshes=self.reads.refreshes,
            steps=self.reads.steps,
        )

    def vision_positions(self, row: int) -> tuple[Tensor, Tensor]:
        """Positions of a row's kept and core vision tokens, `[G, kept]` and `[G, core]`.

        Where heads differ in how many they keep, a head that keeps fewer than the most begins with -1.
        """
        if isinstance(self.stored, RaggedHeads):
            return (self.stored.positions[row],) * 2
        plan, end = self.plans[row], self._first + self._left - self.plans[row].system
        own = self._positions(end)[row, : None if self.per_kv_head else 1]
        core = own[:, end - plan.core :]
        if self.stored is None:
            return own[:, end - plan.vision :], core
        kept = torch.cat([own[:, self._first - self.stored.counts[row] : self._first], core], dim=-1)
        return kept, kept if self.reads_stored else core

    def text_positions(self, row: int) -> Tensor:
        """Positions of a row's text and generated tokens that are held, `[G, count]`."""
        positions = self.buffers[2]
        own = positions[row] if self.rule.heads_apart else positions[row, :1]
        own = own[:, self._left : self._left + self.text.counts[row]]
        if self.words is None:
            return own
        first = self.words.width - self.plans[row].low_text
        return torch.cat([self.words.positions[row, :1, first:], own], dim=-1)

    def _turn_slots(self, width: int) -> tuple[Tensor, Tensor]:
        """Classes `[B, 1 or G, width]` and positions `[B, G, width]` of what a turn finds, words first."""
        words = self.words
        if words is None:
            return self._classes(width), self._positions(width)
        texts = per_row([plan.low_text for plan in self.plans], self.device)
        column = torch.arange(words.width, device=self.device)
        classes = torch.where(column < words.width - texts, SYSTEM, TEXT)
        if words.mask is not None:
            classes = classes.masked_fill(~words.mask[:, :, 0], PADDING)
        own, places = self._classes(width - words.width), self._positions(width - words.width)
        classes = torch.cat([classes.expand(-1, own.shape[1], -1), own], dim=-1)
        return classes, torch.cat([words.positions, places], dim=-1)

    def _store(
        self, call: AttentionCall, places: tuple[Tensor, int], chosen: Tensor, plans: list[RowPlan]
    ) -> None:
        """Store kept vision outside the core beside the buffers.

        Args:
            places: the candidates' positions, and the column where what was stored before begins.
            chosen: columns `[B, G, m]` of the left part, where it stands before core and system; bool
                `[B, Hkv, n]`, which candidates it is, where heads differ in how many they keep.
            plans: what each row holds.
        """
        positions, first = places
        key, value, positions = call.key[:, :, first:], call.value[:, :, first:], positions[..., first:]
        if chosen.dtype == torch.bool:
            heads = self.stored if isinstance(self.stored, RaggedHeads) else None
            self.stored = RaggedHeads.of(key, value, positions, chosen[..., first:], heads, self.bits)
            return
        counts = [plan.vision - plan.core for plan in plans]
        ends = per_row([chosen.shape[-1] - plan.system - plan.core for plan in plans], chosen.device)
        slots = ends + torch.arange(-max(counts), 0, device=chosen.device)
        order = chosen.gather(-1, slots.clamp(min=0).expand(*chosen.shape[:2], -1)) - first
        before = self.stored if isinstance(self.stored, StoredBits) else None
        self.stored = StoredBits.of(key, value, positions, order.clamp(min=0), counts, before, self.bits)

    def _store_words(self, call: AttentionCall, candidates: Candidates, plans: list[RowPlan]) -> Candidates:
        """Store system and prompt text in few bits, system first; the candidates with these apart."""
        system, text, counts = candidates.system, candidates.text, [plan.low for plan in plans]
        text[..., self._words : candidates.turn.past] = False  # what was generated stays as it is
        order = torch.where(text, 2, system.long()).argsort(dim=-1, stable=True)
        order = order[..., order.shape[-1] - max(counts) :].expand(-1, candidates.positions.shape[1], -1)
        parts = call.key, call.value, candidates.positions
        self.words = StoredBits.of(*parts, order, counts, self.words, self.text_bits)
        return replace(candidates, apart=system | text)

    def _classes(self, width: int) -> Tensor:
        """Class `[B, 1 or Hkv, width]` of each of the first slots."""
        own = slot_classes(self._full, self.text.counts, self._left, width - self._first, self.device)
        if self.stored is None:
            return own
        beside = self.stored.classes
        return torch.cat([beside, own.expand(-1, beside.shape[1], -1)], dim=-1)

    def _positions(self, width: int) -> Tensor:
        """Logical positions `[B, G, width]` of the first slots."""
        own = self.buffers[2][..., : width - self._first]
        return own if self.stored is None else torch.cat([self.stored.positions, own], dim=-1)

    @property
    def _first(self) -> int:
        """Slots of what is stored in few bits, which come before those of the buffers."""
        return 0 if self.stored is None else self.stored.width

    @property
    def _words(self) -> int:
        """Slots of system and text in few bits, which come before all others."""
        return 0 if self.words is None else self.words.width
