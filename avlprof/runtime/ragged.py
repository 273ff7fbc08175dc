"""Vision tokens where KV heads differ in how many they keep: one run of all heads', without padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from avlprof.attention.call import AttentionCall, Bounds, StepStates
from avlprof.attention.codec import Packed, decode, encode, packed_bytes
from avlprof.attention.column_sums import kernels_run
from avlprof.policy import FULL
from avlprof.runtime.layout import PADDING, STORED
from avlprof.runtime.packed import block_size

States = Tensor | Packed


@dataclass(frozen=True)
class RaggedHeads:
    """What a layer keeps of vision where its KV heads differ in their counts; all of it is read at each step.

    `keys` and `values` are `[S, D]`, in 16 bits or packed: the tokens of the first row's first head, of its
    second, and so on; `places [S]` are their logical positions. `lengths` are tokens by row and head, whose
    sum in a row is a multiple of the heads. What asks for slots, one for each head of each row, sees
    `width` of them, the longest head's, with tokens right-aligned; only logits and weights are laid out so.
    """

    keys: Tensor | Packed
    values: Tensor | Packed
    places: Tensor
    lengths: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        kept: Tensor,
        held: RaggedHeads | None,
        bits: int,
    ) -> RaggedHeads:
        """Of the tokens `kept`, bool `[B, Hkv, n]`, of `key` and `value [B, Hkv, n, D]`.

        The first of them are the slots of what is `held`, which moves as it is, without being quantised
        again. Waits for the device: how many a head keeps depends on scores.

        Args:
            positions: `[B, Hkv, n]` logical.
            bits: 16, or the few bits that a number is stored in.
        """
        rows, heads, columns = kept.nonzero().unbind(1)
        old = held.slots(rows, heads, columns) if held is not None and held.width else None
        was = columns < (0 if held is None else held.width)

        def stored(states: Tensor, before: States | None) -> States:
            taken = states[rows, heads, columns]
            if bits == FULL:
                return taken
            new = encode(taken, bits)
            if old is None or not isinstance(before, Packed):
                return new
            as_it_was = before.each(lambda part: part[old])
            return new.each(lambda fresh, mine: torch.where(was[:, None], mine, fresh), as_it_was)

        keys = stored(key, None if held is None else held.keys)
        values = stored(value, None if held is None else held.values)
        lengths = tuple(tuple(row) for row in kept.sum(dim=-1).tolist())
        return cls(keys, values, positions[rows, heads, columns], lengths, key.dtype)

    def slots(self, rows: Tensor, heads: Tensor, columns: Tensor) -> Tensor:
        """Where in the run the slots `columns` of heads of rows are; 0 for slots behind the last."""
        device = self.places.device
        ends = torch.tensor([*accumulate(self._flat_lengths())], device=device).view(len(self.lengths), -1)
        at = ends[rows, heads] - self.width + columns
        return at.masked_fill(columns >= self.width, 0)

    @cached_property
    def width(self) -> int:
        """Slots of a head: as many as the longest holds."""
        return max(self._flat_lengths(), default=0)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each row, in the mean over heads."""
        return tuple(sum(row) // len(row) for row in self.lengths)

    @property
    def parts(self) -> list[Tensor]:
        """All that tokens are made of, positions too."""
        held = (part for states in (self.keys, self.values) for part in _parts(states))
        return [*held, self.places]

    @property
    def share(self) -> float:
        """Bytes of a token over those it takes in 16 bits."""
        if not isinstance(self.keys, Packed) or not isinstance(self.values, Packed):
            return 1.0
        sizes = self.keys.size, self.values.size
        return sum(packed_bytes(size, self.keys.bits) for size in sizes) * 8 / (sum(sizes) * FULL)

    @cached_property
    def mask(self) -> Tensor | None:
        """bool `[B, Hkv, 1, width]`: slots that hold a token; None where all do."""
        if min(self._flat_lengths(), default=0) == self.width:
            return None
        column = torch.arange(self.width, 0, -1, device=self.places.device)
        return (column <= torch.tensor(self.lengths, device=column.device)[..., None])[:, :, None]

    @property
    def classes(self) -> Tensor:
        """STORED or PADDING for each slot, `[B, Hkv, width]`."""
        shape = (len(self.lengths), len(self.lengths[0]), self.width)
        classes = torch.full(shape, STORED, device=self.places.device)
        return classes if self.mask is None else classes.masked_fill(~self.mask[:, :, 0], PADDING)

    @property
    def positions(self) -> Tensor:
        """Logical positions of the slots, `[B, Hkv, width]`; -1 where they hold nothing."""
        return self._laid_out(self.places[:, None], -1)[..., 0]

    def decoded(self) -> tuple[Tensor, Tensor]:
        """All keys and values by slot, `[B, Hkv, width, D]` each: for a turn or an observer, not a step."""
        keys, values = _numbers(self.keys, self.dtype), _numbers(self.values, self.dtype)
        return self._laid_out(keys, 0), self._laid_out(values, 0)

    def logits(self, query: Tensor, scaling: float, softcap: float | None) -> list[Tensor]:
        """Logits of `query [B, H, 1, D]` on the slots, fp32 `[B, Hkv, g, width]`; 0 where none is."""
        batch, heads = query.shape[:2]
        groups = len(self.lengths[0])
        rows = query.view(batch, groups, heads // groups, -1).float() * scaling
        out = rows.new_zeros((*rows.shape[:3], self.width))
        for start, count, pieces in self._blocks:
            key = _numbers(_narrowed(self.keys, start, count), self.dtype).float()
            for row, head, slot, at, n in pieces:
                out[row, head, :, slot : slot + n] = rows[row, head] @ key[at : at + n].mT
        return [out if softcap is None else softcap * torch.tanh(out / softcap)]

    def mixed(self, weights: Tensor) -> Tensor:
        """Values weighted by `weights [B, H, width]`, added up in fp32: `[B, 1, H, D]`."""
        groups = len(self.lengths[0])
        rows = weights.view(len(weights), groups, -1, self.width)
        size = self.values.size if isinstance(self.values, Packed) else self.values.shape[-1]
        out = weights.new_zeros((*rows.shape[:3], size), dtype=torch.float32)
        for start, count, pieces in self._blocks:
            value = _numbers(_narrowed(self.values, start, count), self.dtype).float()
            for row, head, slot, at, n in pieces:
                out[row, head] += rows[row, head, :, slot : slot + n] @ value[at : at + n]
        return out.view(len(weights), 1, -1, size)

    def by_kernels(self, call: AttentionCall, mask: Tensor | None, bounds: Bounds | None) -> Tensor | None:
        """Output `[B, 1, H, D]` of a step over what is here and the call's keys; None where no kernels run.

        Arguments are those of `stored_attention`; `bounds` say what `mask` does.
        """
        keys, values = self.keys, self.values
        if isinstance(keys, Packed) or isinstance(values, Packed) or not self.width:
            return None
        if not kernels_run(call.query) or (mask is not None and bounds is None):
            return None
        from avlprof.attention.triton_decode import triton_joined

        near = StepStates(
            call.query, call.key, call.value, call.scaling, call.softcap, call.sinks, mask, bounds
        )
        pairs = len(self._flat_lengths())
        keys, values = (part.expand(pairs, 1, -1, -1) for part in (keys, values))
        queries = call.query.reshape(pairs, -1, 1, call.query.shape[-1])
        far = StepStates(queries, keys, values, call.scaling, call.softcap, None, None, self._bounds)
        return triton_joined(near, far)

    @cached_property
    def _bounds(self) -> Bounds:
        """The tokens of each head of each row."""
        lengths = torch.tensor(self._flat_lengths(), device=self.places.device)
        ends = lengths.cumsum(dim=0)
        return Bounds(ends - lengths, ends - 1, 0)

    def select_rows(self, rows: Tensor) -> RaggedHeads:
        """The batch's rows `rows`, in that order and with repeats."""
        counts = [sum(row) for row in self.lengths]
        ends = [*accumulate(counts)]
        picked = rows.tolist()
        device = self.places.device
        at = torch.cat([torch.arange(ends[row] - counts[row], ends[row], device=device) for row in picked])
        keys, values = (_each(states, at) for states in (self.keys, self.values))
        lengths = tuple(self.lengths[row] for row in picked)
        return RaggedHeads(keys, values, self.places[at], lengths, self.dtype)

    def allocated_bytes(self) -> int:
        """Bytes of the storage behind all that is held."""
        return sum(part.untyped_storage().nbytes() for part in self.parts)

    @cached_property
    def _blocks(self) -> list[tuple[int, int, list[tuple[int, int, int, int, int]]]]:
        """First token and length of runs that are read, or decoded, at a time, and the heads' pieces of each.

        A piece is a row, a head, its first slot, where it begins in the run, and its length.
        """
        total = sum(self._flat_lengths())
        most = max(total, 1)
        if isinstance(self.keys, Packed):
            most = block_size(self.keys.size, self.places.device)
        blocks: list[tuple[int, int, list[tuple[int, int, int, int, int]]]] = [
            (start, min(most, total - start), []) for start in range(0, total, most)
        ]
        begin = 0
        for row, counts in enumerate(self.lengths):
            for head, count in enumerate(counts):
                at = begin
                while at < begin + count:
                    start, length, pieces = blocks[at // most]
                    end = min(begin + count, start + length)
                    pieces.append((row, head, self.width - begin - count + at, at - start, end - at))
                    at = end
                begin += count
        return blocks

    def _flat_lengths(self) -> list[int]:
        return [count for row in self.lengths for count in row]

    def _laid_out(self, states: Tensor, empty: int) -> Tensor:
        """Numbers `[S, D]` by slot, `[B, Hkv, width, D]`, `empty` where there is none."""
        shape = (len(self.lengths), len(self.lengths[0]), self.width, states.shape[-1])
        whole = states.new_full(shape, empty)
        mask = self.mask
        if mask is None:
            return states.view(shape)
        whole[mask[:, :, 0]] = states
        return whole


def _parts(states: States) -> tuple[Tensor, ...]:
    return states.parts if isinstance(states, Packed) else (states,)


def _each(states: States, at: Tensor) -> States:
    """The tokens `at`."""
    return states.each(lambda part: part[at]) if isinstance(states, Packed) else states[at]


def _narrowed(states: States, start: int, count: int) -> States:
    return states.narrow(start, count) if isinstance(states, Packed) else states.narrow(0, start, count)


def _numbers(states: States, dtype: torch.dtype) -> Tensor:
    return decode(states, dtype) if isinstance(states, Packed) else states
