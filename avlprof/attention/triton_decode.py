"""Attention of one query row per sequence in two Triton kernels: parts of the keys, then their merging.

The query heads of a KV head are the rows of one tile, so keys and values are read once; the keys of a
head are shared out among programs, each row of the batch by its own length, which the device knows.
Import it only where there is a CUDA device, or Triton's interpreter (`TRITON_INTERPRET=1`).
Source: Flash-Decoding (Dao and others, 2023).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from avlprof.attention.call import StepStates
from avlprof.attention.column_sums import Work
from avlprof.attention.triton_decode_kernels import decode_merge, decode_parts

_PROGRAMS = 264  # two for each processor of an H100
_LEAST_PART = 128  # keys
_MOST_PARTS = 64
_TILE_BYTES = 1 << 14  # of a block of keys, and as much of values, in shared memory
_SCORED = 256  # keys whose weights a program normalises
_TALLIES = 2  # numbers of a part beside its sums: the largest logit, and the sum of weights relative to it


class FewBits(Protocol):
    """Keys or values in 8, 4 or 2 bits: uint8 `codes [B, Hkv, m, D * bits / 8]`, and fp16 `scale` and
    `offset [B, Hkv, m, groups]` of neighbouring channels: `code * scale + offset`. A byte holds the codes of
    its channels from the lowest bits on: in 4 bits, the low half of byte `j` is channel `2 j`."""

    @property
    def codes(self) -> Tensor: ...
    @property
    def scale(self) -> Tensor: ...
    @property
    def offset(self) -> Tensor: ...
    @property
    def bits(self) -> int: ...


class LowPart(Protocol):
    """Slots in few bits that come before those of `StepStates`: their keys, their values, and the number of
    the first one that each row sees, any integer `[B]`."""

    @property
    def key(self) -> FewBits: ...
    @property
    def value(self) -> FewBits: ...
    @property
    def firsts(self) -> Tensor: ...


def triton_decode(
    states: StepStates, sets: int = 0, low: LowPart | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Attention output of one query row per sequence, and its weights; nothing waits for the device.

    Products of half-precision inputs are summed in fp32; those of fp32 inputs are three of TF32, which is
    fp32's precision. A row that sees nothing is zero.

    Args:
        states: what is attended with; its mask is not read, its bounds are. Without a value only
            weights are found.
        sets: sets of query heads whose mean weights are wanted: 0 for none, 1, the KV heads, or
            all heads.
        low: slots in few bits that are seen as well; they come first.

    Returns:
        `[B, 1, H, E]` in the query's type, and fp32 `[B, sets, m + N]`, 0 where a row does not look.
    """
    kernels = DecodeKernels(states, sets, low)
    with torch.cuda.device(states.query.device if states.query.is_cuda else -1):
        return kernels.run()


def triton_joined(states: StepStates, beside: StepStates) -> Tensor:
    """Output `[B, 1, H, E]` of a step over its keys and others that lie beside them, under one softmax.

    Each KV head of each row sees an interval of its own of the latter, so that heads may differ in how
    many keys they have.

    Args:
        states: what is attended with, as in `triton_decode`; its sinks count once.
        beside: the same queries as `[B * Hkv, H / Hkv, 1, D]`, keys and values `[B * Hkv, 1, S, D]`, one run
            for all (of stride 0), and bounds for each.
    """
    near, far = DecodeKernels(states, 0), DecodeKernels(beside, 0)
    near.alone = far.alone = False
    with torch.cuda.device(states.query.device if states.query.is_cuda else -1):
        found = [near.attend(None, None), far.attend(None, None)]
        shape = (near.batch, near.heads, -1)
        tallies, sums = (
            torch.cat([part.view(*shape, part.shape[-1]) for part in parts if part is not None], dim=2)
            for parts in zip(*found, strict=True)
        )
        out = states.query.new_empty((near.batch, 1, near.heads, near.value_size))
        near.merge(tallies, sums, out)
    return out


class DecodeKernels:
    """The kernels' arguments, and their calls in order."""

    def __init__(self, states: StepStates, sets: int, low: LowPart | None = None) -> None:
        self.states, self.sets, self.low = states, sets, low
        query, key, value = states.query, states.key, states.value
        self.batch, self.heads, _, self.size = query.shape
        self.groups, self.length = key.shape[1:3]
        self.value_size = self.size if value is None else value.shape[3]
        # the kernels step through the last dimension one by one
        self.query = query if query.stride(-1) == 1 else query.contiguous()
        self.key = key if key.stride(-1) == 1 else key.contiguous()
        values = self.key if value is None else value
        self.value = values if values.stride(-1) == 1 else values.contiguous()
        self.coded = 0 if low is None else low.key.codes.shape[2]
        self.columns = self.coded + self.length
        self.width, self.value_width = (
            max(triton.next_power_of_2(size), 16) for size in (self.size, self.value_size)
        )
        widest = max(self.width, self.value_width) * query.element_size()
        self.block = max(min(_TILE_BYTES // widest, 64), 16)
        pairs = self.batch * self.groups
        most = min(triton.cdiv(self.columns, _LEAST_PART), _MOST_PARTS)
        self.parts = max(min(triton.cdiv(_PROGRAMS, pairs), most), 1)
        self.alone = self.parts == 1 and not sets
        self.seen = {"bounded": states.bounds is not None, "low": low is not None}

    def run(self) -> tuple[Tensor | None, Tensor | None]:
        """The output, and the weights where some are wanted."""
        out = self._new(self.states.value is not None, (self.batch, 1, self.heads, self.value_size))
        logits = self._new(bool(self.sets), (self.batch, self.heads, self.columns), torch.float32)
        scores = self._new(bool(self.sets), (self.batch, self.sets, self.columns), torch.float32)
        tallies, sums = self.attend(out, logits)
        if not self.alone:
            self.merge(tallies, sums, out, logits, scores)
        return out, scores

    def attend(self, out: Tensor | None, logits: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Each part's tallies `[B, H, parts, 2]` and sums of values `[B, H, parts, E]`; one that is alone
        writes `out` instead. Logits are kept where weights are wanted."""
        states, query = self.states, self.query
        valued = states.value is not None
        shape = (self.batch, self.heads, 1 if self.alone else self.parts)
        tallies = torch.empty((*shape, _TALLIES), dtype=torch.float32, device=query.device)
        sums = self._new(valued and not self.alone, (*shape, self.value_size), torch.float32)
        # what is not read may be anything
        firsts, lasts, first = states.bounds or (tallies, tallies, 0)
        coded_firsts = tallies if self.low is None else self.low.firsts
        sinks = tallies if states.sinks is None else states.sinks
        decode_parts[(self.parts, self.batch * self.groups)](
            query, self.key, self.value, firsts, lasts, sinks,
            *self._packed(tallies), coded_firsts,
            tallies if logits is None else logits, tallies, tallies if sums is None else sums,
            tallies if out is None else out,
            *query.stride()[:2], *self.key.stride()[:3], *self.value.stride()[:3],
            self.heads, self.heads // self.groups, self.length, self.coded, first,
            states.scaling, states.softcap or 1.0,
            size=self.size, value_size=self.value_size, **self._constants(), **self.seen, **self._bits(),
            capped=states.softcap is not None, alone=self.alone,
            width=self.width, value_width=self.value_width,
            row_block=max(triton.next_power_of_2(self.heads // self.groups), 16), key_block=self.block,
            num_warps=4, num_stages=3,
        )  # fmt: skip
        return tallies, sums

    def merge(
        self,
        tallies: Tensor,
        sums: Tensor | None,
        out: Tensor | None,
        logits: Tensor | None = None,
        scores: Tensor | None = None,
    ) -> None:
        """Write the output of all parts, as many as there are tallies of, and the weights."""
        states, parts = self.states, tallies.shape[2]
        firsts, lasts, first = states.bounds or (tallies, tallies, 0)
        coded_firsts = tallies if self.low is None else self.low.firsts
        sinks = tallies if states.sinks is None else states.sinks
        jobs = int(states.value is not None) + (triton.cdiv(self.columns, _SCORED) if self.sets else 0)
        decode_merge[(jobs, self.batch * self.heads)](
            tallies if sums is None else sums, tallies, sinks, tallies if logits is None else logits,
            firsts, lasts, coded_firsts,
            tallies if out is None else out, tallies if scores is None else scores,
            self.heads, max(self.sets, 1), parts, self.length, self.coded, first,
            value_size=self.value_size, **self._constants(), **self.seen,
            part_block=triton.next_power_of_2(parts), width=self.value_width, block=_SCORED,
            num_warps=4,
        )  # fmt: skip

    def _new(self, wanted: bool, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Any:
        """A tensor on the query's device, by default of its type; None where none is wanted."""
        query = self.query
        return torch.empty(shape, dtype=dtype or query.dtype, device=query.device) if wanted else None

    def _constants(self) -> dict[str, bool]:
        states = self.states
        return {
            "sunk": states.sinks is not None,
            "weighing": bool(self.sets),
            "valued": states.value is not None,
        }

    @property
    def work(self) -> Work:
        """What the kernels have to do where every row sees all slots of its view."""
        tokens = self.batch * self.groups
        item = self.key.element_size()
        valued = self.states.value is not None
        size = self.size + (self.value_size if valued else 0)
        read = tokens * self.length * size * item
        if self.low is not None:
            parts = (self.low.key, self.low.value) if valued else (self.low.key,)
            read += sum(t.numel() * t.element_size() for p in parts for t in (p.codes, p.scale, p.offset))
        rows = self.batch * self.heads
        between = 0 if self.alone else 8 * rows * self.parts * (_TALLIES + (self.value_size if valued else 0))
        scores = 4 * self.columns * (2 * rows + self.batch * self.sets) if self.sets else 0
        return Work(read + between + scores, 2 * rows * self.columns * size)

    def _packed(self, nothing: Tensor) -> tuple[Tensor, ...]:
        if self.low is None:
            return (nothing,) * 6
        key, value = self.low.key, self.low.value
        parts = (key.codes, key.scale, key.offset, value.codes, value.scale, value.offset)
        return tuple(part.contiguous() for part in parts)

    def _bits(self) -> dict[str, int]:
        """Bits and channels that share a scale, of keys and values."""
        if self.low is None:
            return {"key_bits": 8, "value_bits": 8, "key_group": 16, "value_group": 16}
        key, value = self.low.key, self.low.value
        return {
            "key_bits": key.bits,
            "value_bits": value.bits,
            "key_group": self.size // key.scale.shape[-1],
            "value_group": self.value_size // value.scale.shape[-1],
        }
