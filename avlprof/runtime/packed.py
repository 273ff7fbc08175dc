"""Tokens stored in few bits: beside a layer's buffers, and read block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from avlprof.attention.call import AttentionCall
from avlprof.attention.codec import Packed, decode, encode, packed_bytes
from avlprof.attention.weights import logit_weights, step_logits, weighted_values
from avlprof.policy import FULL
from avlprof.runtime.layout import PADDING, STORED, per_row, put, take


@dataclass(frozen=True)
class StoredBits:
    """What a layer stores in few bits, quantised once: vision that is kept and not core, or system and text.

    `keys` and `values` are packed `[B, Hkv, M, D]`, `positions [B, G, M]` logical. Each row's tokens are
    right-aligned, `counts` are how many; `mask` is bool `[B, 1, 1, M]`, or None where all rows have all M.
    Vision tokens change places with the core in place; slots keep their addresses until the next turn.
    """

    keys: Packed
    values: Packed
    positions: Tensor
    counts: tuple[int, ...]
    dtype: torch.dtype
    mask: Tensor | None

    @classmethod
    def of(
        cls,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        order: Tensor,
        counts: list[int],
        held: StoredBits | None,
        bits: int,
    ) -> StoredBits:
        """Of the tokens `order [B, G, M]` of `key`, `value` and `positions`, the first of which are `held`.

        What is held moves as it is, without being quantised again.
        """

        def packed(states: Tensor, before: Packed | None) -> Packed:
            new = encode(take(states, order), bits)
            if before is None or not before.tokens:
                return new
            old = before.each(lambda part: take(part, order.clamp(max=before.tokens - 1)))
            return new.each(lambda fresh, kept: torch.where(was, kept, fresh), old)

        was = (order < (held.keys.tokens if held is not None else 0))[..., None]
        keys = packed(key, None if held is None else held.keys)
        values = packed(value, None if held is None else held.values)
        mask = None
        if len(set(counts)) > 1:
            column = torch.arange(order.shape[-1] - 1, -1, -1, device=key.device)
            mask = column < per_row(counts, key.device)[..., None]
        return cls(keys, values, positions.gather(-1, order), tuple(counts), key.dtype, mask)

    @property
    def width(self) -> int:
        """Slots of a row, M."""
        return self.keys.tokens

    @property
    def parts(self) -> list[Tensor]:
        """All that tokens are made of: codes, scales, offsets and positions."""
        return [*self.keys.parts, *self.values.parts, self.positions]

    @property
    def classes(self) -> Tensor:
        """STORED or PADDING for each slot, `[B, 1, M]`."""
        rows = self.positions.shape[0]
        classes = self.positions.new_full((rows, 1, self.width), STORED)
        return classes if self.mask is None else classes.masked_fill(~self.mask[:, :, 0], PADDING)

    @property
    def share(self) -> float:
        """Bytes of a token over those it takes in 16 bits."""
        sizes = self.keys.size, self.values.size
        packed = sum(packed_bytes(size, self.keys.bits) for size in sizes)
        return packed * 8 / (sum(sizes) * FULL)

    def decoded(self) -> tuple[Tensor, Tensor]:
        """All keys and values, `[B, Hkv, M, D]` each: for a turn or an observer, not for a step."""
        return decode(self.keys, self.dtype), decode(self.values, self.dtype)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Starts and lengths of runs of slots that are decoded at a time."""
        rows, heads = self.keys.codes.shape[:2]
        size = block_size(rows * heads * self.keys.size, self.positions.device)
        for start in range(0, self.width, size):
            yield start, min(size, self.width - start)

    def logits(self, query: Tensor, scaling: float, softcap: float | None) -> list[Tensor]:
        """Logits of `query [B, H, 1, D]` on the slots, fp32 `[B, Hkv, g, n]` a block."""
        parts = (decode(self.keys.narrow(*block), self.dtype) for block in self.blocks())
        return [step_logits(query, key, scaling, softcap) for key in parts]

    def key_sum(self) -> Tensor:
        """Sum `[B, Hkv, D]` of the keys, fp32."""
        total = self.positions.new_zeros((), dtype=torch.float32)
        for start, count in self.blocks():
            key = decode(self.keys.narrow(start, count), self.dtype).float()
            if self.mask is not None:
                key = key * self.mask[..., start : start + count].mT
            total = total + key.sum(dim=2)
        return total

    def mixed(self, weights: Tensor) -> Tensor:
        """Values weighted by `weights [B, H, M]`, added up in fp32: `[B, 1, H, D]`."""
        batch, heads, _ = weights.shape
        out = weights.new_zeros((batch, 1, heads, self.values.size), dtype=torch.float32)
        for start, count in self.blocks():
            value = decode(self.values.narrow(start, count), self.dtype)
            out += weighted_values(weights.narrow(-1, start, count), value)
        return out

    def exchange(self, old: Tensor, new: Tensor, buffers: tuple[Tensor, Tensor, Tensor], most: int) -> None:
        """Make `new` the core in place of `old`: as many tokens are decoded as are quantised.

        Args:
            old: bool `[B, 1, M + n]` over the slots here and the first `n` of `buffers`, where the core is.
            new: bool `[B, G, M + n]`, with the same number of slots in a row.
            buffers: keys, values and positions in full precision.
            most: a bound of the exchanges of a row. One with fewer repeats its last pair, and one
                without any writes back what it reads.
        """
        leaving, entering = (old & ~new)[..., self.width :], (new & ~old)[..., : self.width]
        counts = leaving.sum(dim=-1, keepdim=True)
        pair = torch.arange(most, device=old.device).minimum(counts - 1).clamp(min=0)
        core, slot = (
            (~marked).long().argsort(dim=-1, stable=True)[..., :most].gather(-1, pair)
            for marked in (leaving, entering)
        )
        some = counts > 0
        for states, packed in zip(buffers[:2], (self.keys, self.values), strict=True):
            leaves, enters = take(states, core), packed.each(lambda part: take(part, slot))
            put(states, core, torch.where(some[..., None], decode(enters, states.dtype), leaves))
            fresh = encode(leaves, packed.bits)
            for part, now, was in zip(packed.parts, fresh.parts, enters.parts, strict=True):
                put(part, slot, torch.where(some[..., None], now, was))
        at_core, at_slot = take(buffers[2], core), take(self.positions, slot)
        put(buffers[2], core, torch.where(some, at_slot, at_core))
        put(self.positions, slot, torch.where(some, at_core, at_slot))

    def select_rows(self, rows: Tensor) -> StoredBits:
        """The batch's rows `rows`, in that order and with repeats."""

        def chosen(part: Tensor) -> Tensor:
            return part.index_select(0, rows.to(part.device))

        counts = tuple(self.counts[row] for row in rows.tolist())
        mask = None if self.mask is None else chosen(self.mask)
        keys, values = self.keys.each(chosen), self.values.each(chosen)
        return StoredBits(keys, values, chosen(self.positions), counts, self.dtype, mask)

    def fitted(self, width: int, masked: bool) -> StoredBits:
        """The same in `width` slots a row, more or fewer at the front; `masked`: some rows have fewer tokens.

        No row has more tokens than that.
        """
        more = width - self.width

        def own(part: Tensor) -> Tensor:  # a negative pad takes slots away
            return pad(part, (0, 0, more, 0))

        mask = None
        if masked:
            mask = self.positions.new_ones((len(self.counts), 1, 1, self.width), dtype=torch.bool)
            mask = pad(mask if self.mask is None else self.mask, (more, 0))
        keys, values, positions = self.keys, self.values, self.positions
        if more:
            keys, values = keys.each(own), values.each(own)
            positions = pad(positions, (more, 0), value=-1)
        return replace(self, keys=keys, values=values, positions=positions, mask=mask)

    def copied(self) -> StoredBits:
        """The same in tensors of its own."""
        keys, values = self.keys.each(torch.clone), self.values.each(torch.clone)
        mask = None if self.mask is None else self.mask.clone()
        return replace(self, keys=keys, values=values, positions=self.positions.clone(), mask=mask)

    def refilled(self, other: StoredBits) -> StoredBits:
        """Another content of the same shapes, where this one's tensors lie."""
        for mine, new in zip(self.parts, other.parts, strict=True):
            mine.copy_(new)
        if self.mask is not None and other.mask is not None:
            self.mask.copy_(other.mask)
        return replace(self, counts=other.counts)

    def allocated_bytes(self) -> int:
        """Bytes of the storage behind codes, scales, offsets and positions."""
        return sum(part.untyped_storage().nbytes() for part in self.parts)


_NUMBERS = 1 << 17
"""Numbers decoded at a time on a CPU, so that they stay in its cache; 16 times as many elsewhere."""

_LEAST = 16
"""Slots of a block, of however many rows and heads."""


def block_size(numbers: int, device: torch.device) -> int:
    """Slots that are decoded at a time, of so many numbers each."""
    most = _NUMBERS if device.type == "cpu" else _NUMBERS << 4
    return max(most // numbers, _LEAST)


class Stored(Protocol):
    """What is stored beside the buffers, `StoredBits` or heads that differ in their counts.

    `mask` is bool `[B, 1 or Hkv, 1, width]`, or None where all slots hold a token; `positions`
    `[B, 1 or Hkv, width]` are logical.
    """

    @property
    def width(self) -> int: ...
    @property
    def mask(self) -> Tensor | None: ...
    @property
    def positions(self) -> Tensor: ...
    def decoded(self) -> tuple[Tensor, Tensor]: ...
    def logits(self, query: Tensor, scaling: float, softcap: float | None) -> list[Tensor]: ...
    def mixed(self, weights: Tensor) -> Tensor: ...


Parts = Sequence[Stored]
"""What is stored of a layer and read before its buffers: `M` slots together."""


def stored_weights(
    parts: Parts,
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`step_weights` of `[B, H, M + n]`: on what is stored, then on `key [B, Hkv, n, D]`."""
    logits = [one for part in parts for one in part.logits(query, scaling, softcap)]
    logits.append(step_logits(query, key, scaling, softcap))
    return logit_weights(torch.cat(logits, dim=-1), joined_mask(parts, mask, key.shape[2]), sinks)


def stored_attention(parts: Parts, call: AttentionCall, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output `[B, 1, H, D]` and weights `[B, H, M + n]` of a step over what is stored and the call's keys."""
    weights = stored_weights(parts, call.query, call.key, call.scaling, mask, call.softcap, call.sinks)
    first = weights.shape[-1] - call.key.shape[2]
    out = weighted_values(weights[..., first:], call.value)
    for part in reversed(parts):
        first -= part.width
        out = part.mixed(weights.narrow(-1, first, part.width)).add_(out)
    return out.to(call.value.dtype), weights


def joined_mask(parts: Parts, mask: Tensor | None, count: int) -> Tensor | None:
    """Bool `[B, 1 or Hkv, 1, M + count]` over stored slots and `count` others with a mask of their own."""
    for part in reversed(parts):
        if part.mask is not None:
            own = part.mask.new_ones((1, 1, 1, count)) if mask is None else mask
            heads = max(part.mask.shape[1], own.shape[1])
            both = (one.expand(len(part.mask), heads, -1, -1) for one in (part.mask, own))
            mask = torch.cat([*both], dim=-1)
        elif mask is not None:
            mask = pad(mask, (part.width, 0), value=True)
        count += part.width
    return mask


def with_stored(parts: Parts, call: AttentionCall) -> AttentionCall:
    """The call with what is stored decoded before its own keys: what observers are shown."""
    positions, valid = call.positions, joined_mask(parts, call.valid, call.key.shape[2])
    assert positions is not None
    keys, values = zip(*(part.decoded() for part in parts), strict=True)
    return call._replace(
        key=torch.cat([*keys, call.key], dim=2),
        value=torch.cat([*values, call.value], dim=2),
        positions=torch.cat([*(part.positions for part in parts), positions], dim=-1),
        valid=valid,
    )
