"""The text part of a layer: which text and generated tokens stay, at a prompt and at every step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from avlprof.attention.ranking import step_scores
from avlprof.policy import Policy, broadcast, text_room
from avlprof.runtime.buffers import RESERVE
from avlprof.runtime.layout import move, per_row, within


@dataclass(frozen=True)
class TextRule:
    """How the text part of one layer of `layers` forgets; in a joint pool it holds all tokens."""

    policy: Policy
    layer: int
    layers: int

    @cached_property
    def running(self) -> str | None:
        """`Policy.running`, which every step asks for."""
        return self.policy.running

    @cached_property
    def evicts(self) -> bool:
        """Whether a token can be evicted while decoding."""
        return self.policy.evicts_by is not None

    @cached_property
    def grows(self) -> bool:
        """Whether the most tokens held grow with the text."""
        return not self.evicts or self.policy.text.keep is not None

    @cached_property
    def heads_apart(self) -> bool:
        """Whether each KV head has its own set."""
        if self.policy.joint is not None:
            return self.policy.heads == "kv_head"
        return self.policy.text.scored

    @cached_property
    def deleted(self) -> float:
        """`Policy.deleted` of this layer."""
        return self.policy.deleted(self.layer)

    def sink(self, pool: int) -> int:
        """First tokens that are never evicted."""
        if self.policy.joint is not None:
            return min(self.policy.joint.sink, pool)
        return broadcast(self.policy.text.sink, self.layers)[self.layer]

    def room(self, seen: int, pool: int) -> tuple[int, int]:
        """Most tokens held after `seen` of them have passed, and how many of these are the newest."""
        return text_room(self.policy, seen, pool, self.layer)


class TextPart:
    """Counts, ages and scores of a layer's text slots; the layer owns the buffers.

    Lists have one entry a row. All heads of a row hold the same number of tokens. `scores`
    `[B, G, capacity]` and `prompt_tokens [B, G]`, the number of prompt tokens in memory, live on the device;
    `prompt_read` sums the latter up over rows and steps. Where age decides, `prompt` holds the number.
    """

    def __init__(self, rule: TextRule) -> None:
        self.rule = rule
        self.counts: list[int] = []
        self.seen: list[int] = []
        self.pools: list[int] = []
        self.prompt: list[int] = []
        self._ages: list[deque[int]] = []
        self.scores: Tensor | None = None
        self.prompt_tokens: Tensor | None = None
        self.prompt_read: Tensor | None = None

    def lay(
        self, counts: list[int], positions: Tensor, spans: list[tuple[int, int]], scores: Tensor | None
    ) -> None:
        """Start anew with slots in the order of their `positions [B, G, n]`; prompts are in `spans`."""
        self.counts, self.scores = counts, scores
        if self.rule.running is not None:
            self.prompt_tokens = tokens = _prompt_tokens(counts, positions, spans)
            if self.prompt_read is None:
                self.prompt_read = torch.zeros((), dtype=torch.float64, device=tokens.device)
            return
        # behind a first prompt nothing else is held, and the host need not wait for the device's count
        self.prompt = list(counts)
        if len(spans) > 1:
            self.prompt = _prompt_tokens(counts, positions, spans)[:, 0].tolist()
        self._ages = [
            deque(range(min(self.rule.sink(pool), n), n)) for pool, n in zip(self.pools, counts, strict=True)
        ]

    def extend(self, new: list[int], kept: list[int]) -> list[int]:
        """Count a turn: `new` text tokens a row, of which policies keep `kept`; tokens held after it."""
        nothing = [0] * len(new)
        self.counts = self.counts or nothing
        self.seen = [a + b for a, b in zip(self.seen or nothing, new, strict=True)]
        self.pools = [a + b for a, b in zip(self.pools or nothing, kept, strict=True)]
        if not self.rule.evicts:
            return [a + b for a, b in zip(self.counts, kept, strict=True)]
        limits = self.pools if self.rule.policy.joint is not None else [limit for limit, _ in self.rooms()]
        return [min(a + b, most) for a, b, most in zip(self.counts, new, limits, strict=True)]

    @property
    def by_age(self) -> bool:
        """Whether of a first prompt the first tokens and the newest stay, by counts alone."""
        return self.rule.policy.joint is None and self.rule.running is None

    def reserve(self, most: int) -> int:
        """Slots to allocate beyond `most` that are held."""
        if self.rule.grows:
            return RESERVE
        limits = [limit for limit, _ in self.rooms()]
        return min(max(0, max(limits) - most), RESERVE) + int(self.rule.running is not None)

    def rooms(self) -> list[tuple[int, int]]:
        """Of each row, the most tokens that it holds now, and how many of these are the newest."""
        return [self.rule.room(seen, pool) for seen, pool in zip(self.seen, self.pools, strict=True)]

    def claim(self, row: int) -> int:
        """The slot of a row's next token: a free one, or that of its oldest evictable."""
        self.seen[row] += 1
        count = self.counts[row]
        if not self.rule.evicts or self.rule.running is not None:
            self.counts[row] += 1
            return count
        if count < self.rule.room(self.seen[row], self.pools[row])[0]:
            if count >= self.rule.sink(self.pools[row]):
                self._ages[row].append(count)
            self.counts[row] += 1
            return count
        slot = self._ages[row].popleft()
        self._ages[row].append(slot)
        if self.prompt[row] > self.rule.sink(self.pools[row]):
            self.prompt[row] -= 1
        return slot

    def forget(
        self, weights: Tensor, buffers: tuple[Tensor, Tensor, Tensor], spans: list[tuple[int, int]]
    ) -> None:
        """Score the slots by a decoding row, and evict the worst where there is one too many.

        The newest token moves into the slot of the one that goes, so shapes are fixed, and all that
        depends on scores stays on the device.

        Args:
            weights: `[B, G, n]` attention of the step to the text slots.
            buffers: the text's keys and values, `[B, H, n, D]`, and logical positions, `[B, G, n]`.
            spans: positions of prompt tokens, from and to.
        """
        assert self.scores is not None and self.prompt_tokens is not None and self.rule.running is not None
        device, width, positions = weights.device, weights.shape[-1], buffers[2]
        slot = torch.arange(width, device=device)
        counts = per_row(self.counts, device)
        present, last = slot < counts, counts - 1
        # 1 score: what this row gives adds to what earlier rows gave
        sums = self.scores[..., :width]
        scores = step_scores(
            self.rule.running, sums, weights, present.expand_as(weights), (slot == last), self.rule.deleted
        )
        sums.copy_(scores.masked_fill(~present, 0.0))
        # 2 choose: the lowest score that is neither a sink nor among the newest; of equals the newest goes.
        # Sinks are the first slots: `text_order` lays them out there, and no move ever targets them
        rooms = self.rooms()
        full = [count > limit for count, (limit, _) in zip(self.counts, rooms, strict=True)]
        if not any(full):
            return
        sinks = per_row([self.rule.sink(pool) for pool in self.pools], device)
        newest = per_row([min(new, n) for (_, new), n in zip(rooms, self.counts, strict=True)], device)
        by_age = positions.masked_fill(~present, -1).sort(dim=-1, descending=True).values
        edge = by_age.gather(-1, (newest - 1).clamp(min=0).expand(*by_age.shape[:2], 1))
        loose = present & (slot >= sinks) & ~((positions >= edge) & (newest > 0))
        lowest = scores.masked_fill(~loose, float("inf")).amin(dim=-1, keepdim=True)
        tied = loose & (scores == lowest)
        victim = positions.masked_fill(~tied, -1).argmax(dim=-1, keepdim=True)
        going = per_row([int(over) for over in full], device) > 0
        victim = torch.where(going, victim, last)
        gone = positions.gather(-1, victim)
        self.prompt_tokens -= (within(gone, spans) & going)[..., 0].long()
        # 3 lay out: the newest token takes the victim's slot; a row that keeps all moves it onto itself
        source = last.expand_as(victim)
        for buffer in (*buffers, sums):
            move(buffer, source, victim)
        # 4 free: the last slot counts no more, and the next token takes it
        self.counts = [count - over for count, over in zip(self.counts, full, strict=True)]

    def count_read(self) -> float:
        """Prompt tokens of this step's text, over rows; what the device knows is added up there."""
        if self.prompt_tokens is None or self.prompt_read is None:
            return float(sum(self.prompt))
        self.prompt_read += self.prompt_tokens.double().mean(dim=1).sum()
        return 0.0

    def prompt_slots(self, heads: int) -> list[int]:
        """Prompt tokens of each row in memory, summed over `heads` KV heads."""
        if self.prompt_tokens is None:
            return [count * heads for count in self.prompt]
        return (self.prompt_tokens.sum(dim=1) * (heads // self.prompt_tokens.shape[1])).tolist()

    def select_rows(self, rows: list[int], index: Tensor) -> None:
        """Replace the batch by its rows `rows`, the same in `index`."""
        for name in ("counts", "seen", "pools", "prompt"):
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in rows] if values else values)
        self._ages = [deque(self._ages[row]) for row in rows] if self._ages else []
        for name in ("scores", "prompt_tokens"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, index))

    def grow(self, slots: int) -> None:
        """Make room for the scores of `slots` more tokens."""
        if self.scores is not None:
            self.scores = torch.nn.functional.pad(self.scores, (0, slots))

    def allocated_bytes(self) -> int:
        """Bytes of the storage behind the scores."""
        return 0 if self.scores is None else self.scores.untyped_storage().nbytes()


def _prompt_tokens(counts: list[int], positions: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    """How many of each row's first `counts` positions `[B, G, n]` are in the spans, `[B, G]`."""
    present = torch.arange(positions.shape[-1], device=positions.device) < per_row(counts, positions.device)
    return (within(positions, spans) & present).sum(dim=-1)
